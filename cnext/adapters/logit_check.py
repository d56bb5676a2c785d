"""Reference logits: a checksum of a model's logits on one fixed input, robust against rounding errors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from msgspec import Meta, field
from torch import Tensor, nn

from cnext.adapters.attach import layers
from cnext.records import Record

LENGTH, PLACES = 16, 32
RULE = (
    f"The logits (hidden states, where a model has no head) at the last of {LENGTH} token ids, drawn by torch's CPU "
    "generator with seed 0, special tokens replaced by others, in float32, times 10^decimals: two decimals below their "
    f"standard deviation. Of these the {PLACES} nearest to an integer, at the places named, are rounded, so that an "
    "error of a third of the last decimal changes none. A classifier has fewer, of the whole text: all are rounded, to "
    "up to two more decimals, whichever is nearest to integers. The checksum is the SHA-256 of the integers, joined by "
    "commas."
)


Indices = Annotated[list[Annotated[int, Meta(ge=0, le=10**8)]], Meta(min_length=1)]


class Reference(Record, kw_only=True):
    """reference.json, see `RULE`. size: the number of logits, None in those of earlier versions."""

    rule: str = ""
    input_ids: Indices
    decimals: Annotated[int, Meta(ge=0, le=300)]
    places: Indices
    integers: list[int] = field(default_factory=list)
    sha256: str
    size: int | None = None


def token_ids(model: Any) -> Tensor:
    """(1, L) int64, see `RULE`. A token that stands for an image would have to come with one."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    special = _special(model.config.to_dict())
    usual = [number for number in range(vocabulary) if number not in special] or [0]
    return torch.tensor(
        [[number if number not in special else usual[number % len(usual)] for number in ids[0].tolist()]]
    )


def _special(config: Mapping[Any, Any]) -> set[int]:
    """Ids of special tokens, as in `image_token_id`, `video_token_index` and `eos_token_id`, of parts as well."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special(value)
        elif str(key).endswith(("_token_id", "_token_index", "_token_ids")):
            found |= {each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int)}
    return found


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context for a forward pass that leaves no trace: in eval mode, without dropout and without observers."""
    training = {module: module.training for module in model.modules()}
    observers = {layer: layer.observer for layer in layers(model).values()}
    model.eval()
    for layer in observers:
        layer.observer = None
    for module in training:
        if hasattr(getattr(module, "weight", None), "quant_state"):  # bitsandbytes: on a CPU, eval mode packs it again
            module.training = True
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for layer, observer in observers.items():
            layer.observer = observer


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(vocabulary,) float64 of (1, L) token ids: logits at the last one, a classifier's (labels,), or hidden states."""
    ids = ids.to(next(model.parameters()).device)
    decoder = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    # Not model(...): the autocast that accelerate puts around an instance's forward would round the logits.
    with undisturbed(model):
        output = type(model).forward(model, input_ids=ids, **decoder)
    values = getattr(output, "logits", None)
    values = output.last_hidden_state if values is None else values
    values = values[0] if values.dim() == 2 else values[0, -1]
    return values.double().cpu()


def _spread(logits: Tensor) -> Tensor:
    """The standard deviation; of a single logit its size."""
    return logits.std() if len(logits) > 1 else logits.abs().max()


def _checksum(integers: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, integers)).encode()).hexdigest()


def reference(model: Any) -> Reference:
    """The content of reference.json, see `RULE`."""
    ids = token_ids(model)
    logits = last_logits(model, ids)
    decimals = 2 - math.floor(math.log10(float(_spread(logits))))
    if len(logits) < PLACES:
        choices = range(decimals, decimals + 3)
        decimals = min(choices, key=lambda d: float((logits * 10.0**d - (logits * 10.0**d).round()).abs().max()))
    scaled = logits * 10.0**decimals
    places = (scaled - scaled.round()).abs().argsort()[:PLACES].sort().values
    integers = scaled[places].round().long().tolist()
    return Reference(
        rule=RULE,
        input_ids=ids[0].tolist(),
        decimals=decimals,
        places=places.tolist(),
        integers=integers,
        sha256=_checksum(integers),
        size=len(logits),
    )


def _here(model: Any, kept: Reference) -> Tensor | None:
    """The model's logits for a reference's token ids; None where it lacks an id or place, or has another number."""
    if max(kept.input_ids) >= model.get_input_embeddings().num_embeddings:
        return None
    logits = last_logits(model, torch.tensor([kept.input_ids]))
    return logits if max(kept.places) < len(logits) == (kept.size or len(logits)) else None


def agrees(model: Any, kept: Reference) -> bool:
    """Whether a model gives the logits of a reference.json."""
    logits = _here(model, kept)
    if logits is None:
        return False
    integers = (logits[kept.places] * 10.0**kept.decimals).round().long().tolist()
    return _checksum(integers) == kept.sha256


def deviation(model: Any, kept: Reference) -> float:
    """The largest difference from the logits of a reference.json, in standard deviations of the logits.

    0 where the model `agrees`, infinite where it has another vocabulary.
    """
    logits = _here(model, kept)
    if logits is None or len(kept.integers) != len(kept.places):
        return math.inf
    scaled = logits[kept.places] * 10.0**kept.decimals
    if _checksum(scaled.round().long().tolist()) == kept.sha256:
        return 0.0
    worst = (scaled - torch.tensor(kept.integers)).abs().max() / 10.0**kept.decimals / _spread(logits)
    return float(worst) if worst.isfinite() else math.inf
