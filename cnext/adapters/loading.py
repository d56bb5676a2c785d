"""`load`: attaches branches that were saved."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from cnext import packages
from cnext.adapters import hub, saving
from cnext.adapters.attach import layers
from cnext.adapters.exchange import put_branches, require_sizes
from cnext.adapters.logit_check import Reference, deviation
from cnext.adapters.mage import AttachedMage, attach_mage
from cnext.adapters.saving import ALIKE, CONFIG, NO_LOGITS, REFERENCE, SAME, Saved
from cnext.errors import UserError

ROUNDED = 0.1
"""As `SAME`, where either model is in half precision."""


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    check: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AttachedMage:
    """Attaches the branches that `AttachedMage.save_pretrained` or a `Trainer` saved, with the same bits.

    Args:
        model: the base model, without branches, changed in place as by `attach_mage`.
        folder: what was saved, or the name of a repository of the Hugging Face Hub.
        check: whether to compare the model's logits with the reference logits that were saved with the branches.
        revision, token: of the repository on the Hub.

    Returns:
        The handle of branches with the same names, ranks, scale, dropout and layers.

    Raises:
        UserError: the folder is damaged or of a newer version, the branches do not fit the model, or the model's logits
            are others than those it was saved with: it is another base model. The model is then unchanged.

    Example:
        >>> handle = cnext.load(AutoModelForCausalLM.from_pretrained("base"), "branches")  # doctest: +SKIP
        >>> parameters = handle.train_on(reads=["text"], writes=["text"])  # doctest: +SKIP
    """
    path = Path(folder)
    if not path.exists() and isinstance(folder, str) and hub.REPO_ID.fullmatch(folder) and "/" in folder:
        path = hub.download(folder, revision, token)
    config, branches, kept = saving.read_saved(path)
    _compare_versions(path, config)
    given = config.attached
    options = {name: getattr(given, name) for name in given.__struct_fields__ if name != "language_model"}
    part = _part(model, given.language_model, path)
    try:
        if not layers(model):
            require_sizes(model, branches)
    except UserError as error:
        raise UserError(f"{path}: {error}; {_made(config)}") from error
    handle = attach_mage(model, language_model=part, generator=torch.Generator(), **options)
    try:
        put_branches(model, branches)
        if check:
            _check(model, config, kept, path)
    except UserError as error:
        handle.detach()
        raise UserError(f"{path}: {error}; {_made(config)}") from error
    return handle


def _made(config: Saved) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    return f"it was saved with {config.model} {config.base_model} and {versions}"


def _part(model: nn.Module, name: str | None, folder: Path) -> nn.Module | None:
    if name is None:
        return None
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UserError(
            f"{folder}: its branches are in {name} of the model, and {type(model).__name__} has no such part"
        ) from error


def _compare_versions(folder: Path, config: Saved) -> None:
    """Warns of branches from a newer cnext."""
    theirs, ours = config.versions.get("cnext"), packages.version("cnext")
    if theirs and ours and packages.numbers(theirs) > packages.numbers(ours):
        warnings.warn(f"{folder / CONFIG} was written by cnext {theirs}, newer than this one, {ours}", stacklevel=3)


def _check(model: nn.Module, config: Saved, kept: Reference | None, folder: Path) -> None:
    """Compares with the reference logits. Raises UserError where the model is another one."""
    if kept is None:
        warnings.warn(
            f"{folder} has no {REFERENCE}, so that it is not known whether the model is the one that its branches are "
            "for",
            stacklevel=4,
        )
        return
    try:
        found = deviation(model, kept)
    except NO_LOGITS as error:
        warnings.warn(
            f"{folder}: the model is not compared with {REFERENCE}: {type(error).__name__}: {error}", stacklevel=4
        )
        return
    exact = saving.is_exact(model, config)
    if found <= (SAME if exact else ROUNDED):
        return
    size = "its vocabulary is another" if math.isinf(found) else f"its logits differ by {found:.2g} standard deviations"
    if exact or found > ALIKE:
        raise UserError(
            "the model is not the one that the branches are for, or its weights have changed: "
            f"{size} from {REFERENCE}; load the base model, {config.base_model}, or pass check=False to attach them "
            "anyway"
        )
    warnings.warn(
        f"{folder}: {size} from {REFERENCE}: more than rounding usually does, so the model may not be the one that the "
        f"branches are for, {config.base_model}",
        stacklevel=4,
    )
