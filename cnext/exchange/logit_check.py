"""Reference logits: a checksum of a model's logits on one fixed input, robust against rounding errors."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated, Any

import torch
from msgspec import Meta, field
from torch import Tensor, nn

from cnext.records import Record

LENGTH, PLACES = 16, 32
RULE = (
    f"The logits (hidden states, where a model has no head) at the last of {LENGTH} token ids, drawn by torch's CPU "
    "generator with seed 0, in float32, times 10^decimals: two decimals below their standard deviation. Of these the "
    f"{PLACES} nearest to an integer, at the places named, are rounded, so that an error of a third of the last "
    "decimal changes none. The checksum is the SHA-256 of the integers, joined by commas."
)


Indices = Annotated[list[Annotated[int, Meta(ge=0, le=10**8)]], Meta(min_length=1)]


class Reference(Record, kw_only=True):
    """reference.json, see `RULE`."""

    rule: str = ""
    input_ids: Indices
    decimals: Annotated[int, Meta(ge=0, le=300)]
    places: Indices
    integers: list[int] = field(default_factory=list)
    sha256: str


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(vocabulary,) float64 of (1, L) token ids: logits at the last one, or hidden states without a head."""
    output = model(input_ids=ids.to(next(model.parameters()).device))
    values = output.logits if "logits" in output else output.last_hidden_state
    return values[0, -1].double().cpu()


def _checksum(integers: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, integers)).encode()).hexdigest()


def reference(model: Any) -> Reference:
    """The content of reference.json, see `RULE`."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = last_logits(model, ids)
    decimals = 2 - math.floor(math.log10(float(logits.std())))
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
    )


def agrees(model: Any, kept: Reference) -> bool:
    """Whether a model gives the logits of a reference.json."""
    if max(kept.input_ids) >= model.get_input_embeddings().num_embeddings:
        return False
    logits = last_logits(model, torch.tensor([kept.input_ids]))
    if max(kept.places) >= len(logits):
        return False
    integers = (logits[kept.places] * 10.0**kept.decimals).round().long().tolist()
    return _checksum(integers) == kept.sha256
