"""Converts branches to and from PEFT adapters: one adapter per branch, or one of their total rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from torch import Tensor, nn

from cnext.adapters.exchange import Branches, branches_of, not_finite, refuse_routed
from cnext.errors import UserError, listed, parse_json
from cnext.records import Finite, Record, convert

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Settings of a PEFT adapter that is W + scale B A with an unchanged W, the same in every layer. (Initializations that
are not listed, such as pissa, change W.)"""


class Scale(Record):
    """The rank and what scales B A, in adapter_config.json."""

    r: Annotated[int, Meta(ge=1, lt=2**31)]
    lora_alpha: Finite
    use_rslora: bool | None = None


def save_peft(model: nn.Module, folder: Path, one: bool = False) -> list[Path]:
    """Writes the active branches as PEFT adapters of the model without adapter layers.

    PEFT computes W x + (alpha / r) B A x, summed over active adapters, which with alpha = scale * r equals
    `AdapterLinear`.

    Args:
        model: the model that PEFT will be given, with adapter layers in it.
        folder: where to write; created if needed.
        one: whether to write one adapter of the total rank, by concatenation, into the folder itself; otherwise an
            adapter per branch, in a subfolder of its name.

    Returns:
        The files written.

    Raises:
        UserError: the branches are routed, or there are none.
    """
    refuse_routed(model, "a PEFT adapter")
    branches = branches_of(model)
    if one:
        branches = branches.regrouped({"lora": sum(branches.ranks.values())})
    written = []
    for name, rank in branches.ranks.items():
        pairs = {layer: found[name] for layer, found in branches.pairs.items()}
        written += _save(model, folder if one else folder / name, pairs, rank, branches.scale)
    return written


def _save(
    model: nn.Module, folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], rank: int, scale: float
) -> list[Path]:
    from peft import LoraConfig
    from safetensors.torch import save_file

    patterns = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(layer)): None for layer in pairs}
    targets = "|".join(patterns)
    alpha = scale * rank
    options: dict[str, Any] = {"lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "target_modules": targets}
    if type(model).__name__.endswith("ForCausalLM"):
        options["task_type"] = "CAUSAL_LM"
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(r=rank, lora_dropout=0.0, bias="none", inference_mode=True, **options).save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{layer}.lora_{half}.weight": tensor.contiguous()
        for layer, pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return [folder / CONFIG, folder / WEIGHTS]


def is_peft(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, or subfolders that do."""
    return (folder / CONFIG).is_file() or any(folder.glob(f"*/{CONFIG}"))


def read_peft(folder: Path) -> Branches:
    """Reads a PEFT adapter as a branch "lora", or the adapters in subfolders as branches of the subfolders' names.

    Raises:
        UserError: no adapter, a file that cannot be read, settings or tensors that are not plain LoRA (all are named),
            or adapters of different scales or layers.
    """
    parts = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if (folder / CONFIG).is_file():
        parts = {"lora": folder}
    if not parts:
        raise UserError(f"expected {CONFIG} in {folder} or in its subfolders, found none")
    found = {name: _read_adapter(part) for name, part in parts.items()}
    scales = {name: scale for name, (_, scale) in found.items()}
    if len(set(scales.values())) > 1:
        raise UserError(f"expected adapters of one lora_alpha / r in {folder}, found {scales}")
    (first, (own, scale)), *others = found.items()
    for name, (pairs, _) in others:
        if pairs.keys() != own.keys():
            apart = listed(sorted(pairs.keys() ^ own.keys()))
            raise UserError(f"expected adapters of the same layers in {folder}; {first} and {name} differ in {apart}")
    return Branches({layer: {name: pairs[layer] for name, (pairs, _) in found.items()} for layer in own}, scale)


def _read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Layer to (A, B), and the scale."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = parse_json((folder / CONFIG).read_bytes())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"expected {CONFIG} and {WEIGHTS} of a PEFT adapter in {folder}: {error}") from error
    given = convert(config, Scale, folder / CONFIG, "save the adapter again")
    strange = [f"{key} {config[key]!r}" for key, plain in PLAIN.items() if key in config and config[key] not in plain]
    if strange:
        found = listed(strange)
        raise UserError(f"{folder / CONFIG}: expected a plain LoRA, the same in every layer, found {found}")
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            halves.setdefault(match["layer"], {})[match["half"]] = tensor
        else:
            unknown.append(key)
    alone = [layer for layer, pair in halves.items() if len(pair) < 2]
    unfit = [
        f"{layer}.{half} {tuple(tensor.shape)}"
        for layer, pair in halves.items()
        for half, tensor in pair.items()
        if tensor.ndim != 2 or tensor.shape["AB".index(half)] != given.r
    ]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("unknown keys", unknown),
            ("A without B", alone),
            ("not of rank r", unfit),
            ("not finite numbers", not_finite(tensors)),
        )
        if names
    ]
    if problems or not halves:
        raise UserError(f"{folder / WEIGHTS}: {'; '.join(problems) or 'no lora_A and lora_B in it'}")
    scale = given.lora_alpha / (given.r**0.5 if given.use_rslora else given.r)
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}, scale
