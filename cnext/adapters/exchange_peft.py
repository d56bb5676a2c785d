"""Converts branches to and from PEFT adapters: one adapter per branch, or one of their total rank."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from torch import Tensor, nn

from cnext.adapters.attach import layers
from cnext.adapters.exchange import FLOATS, Branches, branches_of, not_finite, refuse_routed
from cnext.distributed.wrapped_names import unwrapped
from cnext.errors import UserError, listed, parse_json
from cnext.records import Finite, Record, convert
from cnext.regular_files import LARGEST, read_bytes
from cnext.tensor_files import read_tensors

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = re.compile(r"(base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(\.(?P<adapter>[^.]+))?\.weight")
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
ANY_VALUE = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *(
        "fan_in_fan_out",
        "lora_dropout",
        "eva_config",
        "qalora_group_size",
        "megatron_config",
        "megatron_core",
        "runtime_config",
    ),
}
"""Settings that are read, or without effect on what a plain adapter computes. (PEFT turns fan_in_fan_out off itself for
a torch.nn.Linear.)"""
OFF = (None, False, {}, [])
"""Values with which a setting that is unknown here has no effect."""


class Settings(Record):
    """The rank, what scales B A, and which layers have an adapter, in adapter_config.json."""

    r: Annotated[int, Meta(ge=1, lt=2**31)]
    lora_alpha: Finite
    use_rslora: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def save_peft(
    model: nn.Module, folder: Path, one: bool = False, *, base_model: str = "unknown", branches: Branches | None = None
) -> list[Path]:
    """Writes the active branches as PEFT adapters of the model without adapter layers.

    PEFT computes W x + (alpha / r) B A x, summed over active adapters, which with alpha = scale * r equals
    `AdapterLinear`.

    Args:
        model: the model that PEFT will be given, with adapter layers in it.
        folder: where to write; created if needed.
        one: whether to write one adapter of the total rank, by concatenation, into the folder itself; otherwise an
            adapter per branch, in a subfolder of its name.
        base_model: name or path of the model without adapters, base_model_name_or_path.
        branches: to write; None: those of the model.

    Returns:
        The files written.

    Raises:
        UserError: the branches are routed, or there are none.
    """
    refuse_routed(model, "a PEFT adapter")
    branches = branches or branches_of(model)
    options = {"target_modules": _chosen(model, branches.pairs), "base_model_name_or_path": base_model, **_kind(model)}
    if any(layer.transposed for name, layer in layers(model).items() if name in branches.pairs):
        options["fan_in_fan_out"] = True  # PEFT turns it on for a Conv1D itself, with a warning
    if one:
        branches = branches.regrouped({"lora": sum(branches.ranks.values())})
    written = []
    for name, rank in branches.ranks.items():
        pairs = {layer: found[name] for layer, found in branches.pairs.items()}
        written += _save(folder if one else folder / name, pairs, rank, branches.scale, options)
    return written


def _chosen(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """What target_modules must be to name exactly these layers: last parts of their names, or a regular expression.

    A list where that is possible: some tools read nothing else.
    """
    lasts = sorted({name.rpartition(".")[2] for name in names})
    found = {unwrapped(name) for name, module in model.named_modules() if name.rpartition(".")[2] in lasts}
    if found == set(names):
        return lasts
    patterns = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(layer)): None for layer in names}
    return "|".join(patterns)


def _kind(model: nn.Module) -> dict[str, Any]:
    """The settings by which PEFT's Auto classes choose the class of the model."""
    kind = type(model)
    if kind.__name__.endswith("ForCausalLM"):
        return {"task_type": "CAUSAL_LM"}
    return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _save(
    folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], rank: int, scale: float, options: Mapping[str, Any]
) -> list[Path]:
    from peft import LoraConfig
    from safetensors.torch import save_file

    alpha = scale * rank
    alpha = int(alpha) if alpha == int(alpha) else alpha
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        **options,
    )
    config.save_pretrained(str(folder))
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

    Tensors may be named with their adapter (``lora_A.default.weight``) and with the prefixes of torch.compile, data
    parallelism and FSDP.

    Raises:
        UserError: no adapter, a file that cannot be read, settings or tensors that are not plain LoRA or not known (all
            are named), or adapters of different scales or layers.
    """
    parts = _parts(folder)
    if not parts:
        raise UserError(f"expected {CONFIG} in {folder} or in its subfolders, found none")
    return read_parts(parts, folder)


def read_parts(parts: Mapping[str, Path], folder: Path) -> Branches:
    """The adapters in the folders of branches. Raises UserError as `read_peft`; folder: of all, for messages."""
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


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of the adapters by branch."""
    if (folder / CONFIG).is_file():
        return {"lora": folder}
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def layers_without(folder: Path, branches: Branches, layers: Collection[str]) -> list[str]:
    """Those of a model's layers that an adapter was not made for, as with q_proj and v_proj as target modules.

    Args:
        folder: what `read_peft` read.
        branches: what it returned.
        layers: names of the model's adapter layers.

    Raises:
        UserError: the adapter was made for layers that its file lacks, or its file has layers that PEFT would leave
            out with these settings.
    """
    missing = [name for name in layers if name not in branches.pairs]
    if len(missing) == len(layers) or branches.pairs.keys() - set(layers):
        return []  # an adapter of another model
    settings = [_settings(part)[0] for part in _parts(folder).values()]
    chosen = [each for each in settings if each.target_modules is not None]
    if extra := [name for name in branches.pairs if not all(_targets(each, name, folder) for each in chosen)]:
        raise UserError(
            f"{folder}: the adapter has layers that its settings (target_modules, exclude_modules, "
            f"layers_to_transform, layers_pattern) leave out, as PEFT would: {listed(extra)}; correct {CONFIG}, or "
            "save the adapter again"
        )
    if lost := [name for name in missing if any(_targets(each, name, folder) for each in settings)]:
        raise UserError(
            f"{folder}: the adapter lacks layers that its target_modules name: {listed(lost)}; copy or save it again"
        )
    return missing


def _targets(settings: Settings, layer: str, folder: Path) -> bool:
    """Whether PEFT gives a layer an adapter with these settings."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if settings.target_modules is None:
        return False
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    given = {name: getattr(settings, name) for name in names}
    if settings.target_modules == "all-linear":
        given["target_modules"] = [layer.rpartition(".")[2]]
    try:
        config = LoraConfig(**given)
        found = check_target_module_exists(config, layer)
    except (ValueError, re.error) as error:
        raise UserError(f"{folder / CONFIG}: cannot tell which layers have an adapter: {error}") from error
    # A match, or for an excluded layer an object of PEFT's own.
    return found is True or isinstance(found, re.Match)


def files(folder: Path) -> list[Path]:
    """The files that `read_peft` reads in a folder of adapters."""
    return [file for part in _parts(folder).values() for file in (part / CONFIG, _weights(part))]


def unread(folder: Path) -> list[str]:
    """What `read_peft` leaves unread in a folder: other files, such as trained weights beside the adapter."""
    parts = _parts(folder)
    read = {*files(folder), *(part / "README.md" for part in parts.values())}
    places = dict.fromkeys([folder, *parts.values()])
    found = [path for place in places for path in sorted(place.iterdir()) if path not in places and path not in read]
    return [f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}" for path in found if path.name[0] != "."]


def _weights(folder: Path) -> Path:
    """The file of an adapter's tensors: PEFT, too, prefers the newer format."""
    old = folder / OLD_WEIGHTS
    return old if old.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def _settings(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings that are read, and all of them."""
    try:
        config = parse_json(read_bytes(folder / CONFIG, LARGEST))
    except (OSError, ValueError) as error:
        raise UserError(f"expected {CONFIG} of a PEFT adapter in {folder}: {error}") from error
    return convert(config, Settings, folder / CONFIG, "save the adapter again"), config


def _require_plain(config: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for settings with which an adapter is no plain LoRA, or that are not known."""
    from peft import LoraConfig

    usual = {field.name: getattr(LoraConfig(), field.name) for field in dataclasses.fields(LoraConfig)}
    strange = [
        f"{key} {value!r}"
        for key, value in config.items()
        if key not in ANY_VALUE and value not in PLAIN.get(key, (usual.get(key), *OFF))
    ]
    if strange:
        raise UserError(
            f"{file}: expected a plain LoRA, the same in every layer, found {listed(strange)}; merge the adapter by "
            "PEFT, or train one without"
        )


def _read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Layer to (A, B), and the scale."""
    given, config = _settings(folder)
    _require_plain(config, folder / CONFIG)
    if not given.lora_alpha:
        raise UserError(f"{folder / CONFIG}: lora_alpha is 0, with which the adapter adds nothing; correct it")
    file = _weights(folder)
    if not file.is_file():
        raise UserError(f"expected {WEIGHTS} or {OLD_WEIGHTS} of a PEFT adapter in {folder}, found neither")
    tensors = read_tensors(file)
    halves: dict[str, dict[str, Tensor]] = {}
    unknown, twice, adapters = [], [], set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(unwrapped(key))
        if match is None:
            unknown.append(key)
            continue
        adapters.add(match["adapter"] or "default")
        pair = halves.setdefault(match["layer"], {})
        if pair.setdefault(match["half"], tensor) is not tensor:
            twice.append(key)
    alone = [layer for layer, pair in halves.items() if len(pair) < 2]
    unfit = [
        f"{layer}.{half} {tuple(tensor.shape)}"
        for layer, pair in halves.items()
        for half, tensor in pair.items()
        if tensor.ndim != 2 or tensor.shape["AB".index(half)] != given.r or not tensor.numel()
    ]
    quantized = [f"{key} is {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in FLOATS]
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("unknown keys", unknown),
            ("several adapters", sorted(adapters) if len(adapters) > 1 else []),
            ("a second spelling of a key", twice if len(adapters) < 2 else []),
            ("A without B", alone),
            ("not of rank r", unfit),
            ("integers or numbers of 8 bits, expected float32, bfloat16, float16 or float64", quantized),
            ("not finite numbers", not_finite(tensors) if not quantized else []),
        )
        if names
    ]
    if problems or not halves:
        raise UserError(f"{file}: {'; '.join(problems) or 'no lora_A and lora_B in it'}")
    scale = given.lora_alpha / (given.r**0.5 if given.use_rslora else given.r)
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}, scale
