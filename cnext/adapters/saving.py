"""The folder of a model's branches: PEFT adapters, and beside them what restores the branches to the bit."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, field
from torch import Tensor, nn

from cnext import durable, packages
from cnext.adapters import exchange, exchange_peft
from cnext.adapters.attach import adapter_parameters, layers
from cnext.adapters.exchange import Branches
from cnext.adapters.linear import AdapterLinear
from cnext.adapters.logit_check import Reference, deviation, reference
from cnext.adapters.roles import MODALITIES
from cnext.distributed.wrapped_names import unwrapped
from cnext.errors import UserError, listed
from cnext.records import FileName, Finite, PositiveInt, Record, plain, read

CONFIG, REFERENCE, CARD = "cnext_config.json", "reference.json", "README.md"
FORMAT = 1
PACKAGES = ("cnext", "torch", "transformers", "peft")
WRITTEN_BY = "Written by `cnext`"
"""Marks a card that may be replaced."""
NO_LOGITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a model that cannot be run on token ids alone, or whose logits are not finite."""
SAME, ALIKE = 0.001, 0.5
"""Largest deviations, in standard deviations of the logits, of a model that is the same in float32 (another device's
rounding), and of one that may be the same in lower precision or quantized."""
ADVICE = "save the branches again"


class Attached(Record, kw_only=True):
    """The arguments of `attach_mage`. language_model: its name in the model, None for the default."""

    modalities: list[str] = field(default_factory=lambda: list(MODALITIES))
    rank: PositiveInt
    scale: Finite
    dropout: Annotated[float, Meta(ge=0, lt=1)]
    independent: bool
    shared: list[list[str]]
    targets: list[str] | str
    language_model: str | None = None


class Saved(Record, kw_only=True):
    """cnext_config.json. branches: rank of each, in the order of one adapter's columns.  model: its class."""

    format: int
    branches: dict[str, PositiveInt]
    scale: Finite
    attached: Attached
    per_branch: bool
    base_model: str
    model: str
    dtype: str
    versions: dict[str, str] = field(default_factory=dict)
    base_reference: Reference | None = None
    """Reference logits without the branches, in what a `Trainer` resumes from."""

    def __post_init__(self) -> None:
        if not self.branches or not all(map(FileName.fits, self.branches)):
            raise ValueError("Expected names in `branches` that can be a file's")
        if set(self.branches.values()) != {self.attached.rank}:
            raise ValueError("Expected `branches` of the rank in `attached`")


def base_name(model: nn.Module) -> str | None:
    """The name or path that a transformers model was loaded from, a local path absolute; None for a new model."""
    name = getattr(model, "name_or_path", None) or None
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name


def trained_beside(model: nn.Module) -> list[str]:
    """Names of parameters that require a gradient and are no branch's: no adapter holds them."""
    inside = {id(parameter) for layer in layers(model).values() for _, parameter in layer.adapter_parameters()}
    return [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in inside]


def frozen_state(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """How often each frozen parameter was written in place, and its shape; of merged layers the unmerged weight's."""
    unmerged: dict[str, nn.Parameter] = {
        f"{name}.base.weight": layer.unmerged_weight for name, layer in layers(model).items()
    }
    return {
        name: (0 if each.is_inference() else each._version, tuple(each.shape))
        for name, each in (dict(model.named_parameters()) | unmerged).items()
        # bitsandbytes packs its own weights again, and nothing trains them.
        if not each.requires_grad and each.is_floating_point() and not hasattr(each, "quant_state")
    }


def changed_since(model: nn.Module, before: Mapping[str, tuple[int, tuple[int, ...]]]) -> list[str]:
    """Names of frozen parameters that were trained, loaded or resized since `frozen_state`.

    A copy counts from 0, so that a greater count alone is a change. Nothing is known of sharded models.
    """
    if sharded(model):
        return []
    now = frozen_state(model)
    return [n for n, (count, size) in before.items() if n in now and (now[n][0] > count or now[n][1] != size)]


def branches_in(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> Branches:
    """The branches of a model, or those in its state dictionary, as of a sharded model.

    Raises:
        UserError: a branch is not active: what is written acts with all of its branches; or it has no values.
    """
    found = layers(model)
    if idle := sorted({key for layer in found.values() for key in layer.branches if key not in layer.active}):
        raise UserError(f"{listed(idle)}: not active, but an adapter acts with all branches; activate all to save them")
    if state is None and (on_meta := [name for name, each in adapter_parameters(model).items() if each.is_meta]):
        raise UserError(f"{listed(on_meta, 3)}: on the meta device, without values to save; load values first")
    if state is None:
        own = exchange.branches_of(model)
        return Branches({unwrapped(name): pairs for name, pairs in own.pairs.items()}, own.scale)
    named = {unwrapped(name): tensor.detach() for name, tensor in state.items()}
    try:
        pairs = {
            unwrapped(name): {
                key: (named[f"{unwrapped(name)}.branches.{key}.A"], named[f"{unwrapped(name)}.branches.{key}.B"])
                for key in layer.active
            }
            for name, layer in found.items()
        }
    except KeyError as error:
        raise UserError(f"the state dictionary to save lacks a branch, {error}; pass the whole model's") from error
    return Branches(pairs, next(iter(found.values())).scale)


def not_finite(branches: Branches) -> list[str]:
    """Names of the branches' tensors that have values which are not finite, as after training that diverged."""
    return exchange.not_finite(branches.named())


def sharded(model: nn.Module) -> bool:
    """Whether parameters are parts of tensors, so that one process alone cannot run the model."""
    from torch.distributed.tensor import DTensor

    return any(
        isinstance(each, DTensor) or hasattr(each, "ds_id") or hasattr(each, "_is_flat_param") or each.is_meta
        for each in model.parameters()
    ) or any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def _reference(model: nn.Module) -> Reference | None:
    """Reference logits with the branches; None, with a warning, for a model that does not run on token ids alone."""
    if sharded(model):
        return None
    try:
        return reference(model)
    except NO_LOGITS as error:
        warnings.warn(
            "no reference logits are saved with the branches, so loading cannot check the model: "
            f"{type(model).__name__} gives none for token ids alone ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None


def write(
    model: nn.Module,
    attached: Attached,
    folder: Path,
    base_model: str,
    *,
    per_branch: bool = False,
    state: Mapping[str, Tensor] | None = None,
    to_resume: bool = False,
) -> tuple[Saved, Reference | None]:
    """Writes the branches into a folder, over those of earlier.

    Args:
        model: with adapter layers.
        attached: how they were attached.
        base_model: name or path of the model without branches.
        per_branch: an adapter per branch, in subfolders, instead of one of the total rank.
        state: of the whole model, to take the branches from; None: the model's own.
        to_resume: whether training goes on from the folder with the same base model, see `require_same`.

    Returns:
        What is in cnext_config.json and in reference.json.

    Raises:
        UserError: the folder holds a whole model or branches in the other form, or a branch is not active.
    """
    _require_free(folder, per_branch)
    branches = branches_in(model, state)
    _warn_of_places(model)
    broken = not_finite(branches)
    if broken:
        warnings.warn(
            f"the branches saved in {folder} are not finite, {listed(broken, 3)}: training diverged, and cnext.load "
            "refuses them; go on from an earlier checkpoint, with a smaller learning rate",
            stacklevel=3,
        )
    kept = base = None if broken else _reference(model)
    if base is not None and to_resume:
        with exchange.without_branches(model):
            base = _reference(model)
    versions = {name: version for name in PACKAGES if (version := packages.version(name))}
    config = Saved(
        format=FORMAT,
        branches=branches.ranks,
        scale=branches.scale,
        attached=attached,
        per_branch=per_branch,
        base_model=base_model,
        model=type(model).__name__,
        dtype=dtype(model),
        versions=versions,
        base_reference=base if to_resume else None,
    )
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
        unfinished = Path(made)
        exchange_peft.save_peft(model, unfinished, one=not per_branch, base_model=base_model, branches=branches)
        if kept is not None:
            _write_json(unfinished / REFERENCE, kept)
        _write_json(unfinished / CONFIG, config)
        with suppress(FileNotFoundError):  # an earlier one
            (folder / REFERENCE).unlink()
        move(unfinished, folder)
    return config, kept


def _warn_of_places(model: nn.Module) -> None:
    """Warns of layers that a model has at several places: PEFT replaces the first alone."""
    found = layers(model)
    every = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, AdapterLinear)]
    if more := [name for name in every if name not in found]:
        warnings.warn(
            f"{listed(more, 3)}: the same layer as another one, to which PEFT gives no adapter; cnext.load does",
            stacklevel=3,
        )


def dtype(model: nn.Module) -> str:
    """The dtype of most frozen parameters."""
    kinds = [str(layer.unmerged_weight.dtype).removeprefix("torch.") for layer in layers(model).values()]
    return max(set(kinds), key=kinds.count)


def is_exact(model: nn.Module, config: Saved) -> bool:
    """Whether a model and the one that was saved are both in float32 or wider."""
    return {config.dtype, dtype(model)} <= {"float32", "float64"}


def _require_free(folder: Path, per_branch: bool) -> None:
    """Makes a folder for branches. Raises UserError where what is in it would be mixed with them."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"expected a folder to save into, {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a link to nothing too
        raise UserError(f"expected a folder to save into, {folder} cannot be made: {error}") from error
    if (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds a whole model (config.json), to which loading would add the adapter; give another folder"
        )
    top = (folder / exchange_peft.CONFIG).is_file()
    other = (folder / CONFIG).is_file() and read(folder / CONFIG, Saved, "give another folder").per_branch != per_branch
    if other or (per_branch and top):
        here = "one adapter" if top else "an adapter per branch"
        raise UserError(f"{folder} holds branches as {here} already, and both would be loaded; give another folder")


def move(source: Path, target: Path) -> None:
    """Moves files into a folder and its subfolders of the same names, over those that are there."""
    durable.sync_all(source)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
    for path in (source, *source.rglob("*")):  # the folders, now empty
        durable.sync(target / path.relative_to(source))


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")


def read_saved(folder: Path) -> tuple[Saved, Branches, Reference | None]:
    """What `write` wrote.

    Raises:
        UserError: the folder holds none, or a file is damaged or contradicts another.
    """
    if not folder.is_dir():
        raise UserError(f"expected a folder of branches, {folder} is none")
    if not (folder / CONFIG).is_file():
        found = "an adapter of PEFT, which PeftModel.from_pretrained loads" if exchange_peft.is_peft(folder) else "none"
        raise UserError(f"expected branches that save_pretrained wrote, with {CONFIG}, in {folder}; found {found}")
    config = read(folder / CONFIG, Saved, ADVICE)
    if config.format > FORMAT:
        made = config.versions.get("cnext", "a newer version")
        raise UserError(f"{folder / CONFIG}: written by cnext {made}, in format {config.format}; update cnext")
    if config.per_branch:
        missing = [name for name in config.branches if not (folder / name / exchange_peft.CONFIG).is_file()]
        if missing:
            raise UserError(f"{folder} lacks the adapters of {listed(missing)}, which {CONFIG} names; {ADVICE}")
        branches = exchange_peft.read_parts({name: folder / name for name in config.branches}, folder)
    else:
        branches = exchange_peft.read_peft(folder)
    if not config.per_branch and list(branches.ranks) != ["lora"]:
        raise UserError(f"{folder} has an adapter per branch, and {CONFIG} says that it has one; {ADVICE}")
    wrong = sum(branches.ranks.values()) != sum(config.branches.values())
    if wrong or abs(branches.scale - config.scale) > 1e-6 * abs(config.scale):
        raise UserError(
            f"{folder}: {exchange_peft.CONFIG} has ranks {branches.ranks} and lora_alpha / r {branches.scale:g}, "
            f"{CONFIG} {config.branches} and {config.scale:g}; {ADVICE}"
        )
    if len(config.branches) != 2 * len(config.attached.modalities):
        count = len(config.attached.modalities)
        raise UserError(
            f"{folder / CONFIG}: expected two branches for each of {count} modalities, found "
            f"{len(config.branches)}; {ADVICE}"
        )
    branches = Branches(branches.regrouped(config.branches).pairs, config.scale)
    kept = read(folder / REFERENCE, Reference, ADVICE) if (folder / REFERENCE).is_file() else None
    return config, branches, kept


def require_same(model: nn.Module, folder: Path) -> None:
    """Requires the model that a checkpoint of `Trainer` is of; no values of branches are compared.

    Modalities, rank, scale and targets must be those of the checkpoint's branches, and the logits without branches
    those of its base model. Nothing is required of a folder without cnext_config.json.

    Args:
        model: with its branches, of any values.
        folder: of a checkpoint.

    Raises:
        UserError: the model has no branches, branches attached in another way, or is another base model; or the
            checkpoint's cnext_config.json is damaged.

    Example:
        >>> require_same(model, Path("out/checkpoint-500"))  # doctest: +SKIP
    """
    if not (folder / CONFIG).is_file():
        return
    config = read(folder / CONFIG, Saved, ADVICE)
    if not layers(model):
        raise UserError(f"{folder} holds branches, and the model has none to load them into; attach_mage first")
    found: Attached | None = getattr(getattr(model, "save_pretrained", None), "attached", None)
    if found is None:
        return
    for name in ("modalities", "rank", "scale", "targets"):
        here, there = getattr(found, name), getattr(config.attached, name)
        if here != there:
            raise UserError(
                f"{folder}: its branches were attached with {name}={there!r}, those of the model with {name}={here!r}; "
                "attach them as they were to resume"
            )
    if config.base_reference is None or sharded(model):
        return
    try:
        with exchange.without_branches(model):
            difference = deviation(model, config.base_reference)
    except NO_LOGITS:  # as told when the checkpoint was written
        return
    if difference > (SAME if is_exact(model, config) else ALIKE):
        raise UserError(
            f"{folder}: its branches were trained beside {config.base_model}, and the model without branches has other "
            "logits; load that base model to resume"
        )
