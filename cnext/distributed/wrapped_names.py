"""Names of parameters without the prefixes that wrappers of modules put before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from cnext.errors import UserError

T = TypeVar("T")

ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name that torch.compile, FSDP and activation checkpointing add wherever they wrap a module."""
FIRST = "module"
"""The first part, of DistributedDataParallel, DataParallel and DeepSpeed. Elsewhere it may be a module of the model."""


def unwrapped(name: str) -> str:
    """A parameter's name without the prefixes of wrappers.

    Example:
        >>> unwrapped("module._orig_mod.layers.0.weight"), unwrapped("layers._orig_mod.0.module.weight")
        ('layers.0.weight', 'layers.0.module.weight')
    """
    parts = [part for part in name.split(".") if part not in ANYWHERE]
    while len(parts) > 1 and parts[0] == FIRST:
        parts = parts[1:]
    return ".".join(parts)


def without_wrappers(named: Mapping[str, T], what: str) -> dict[str, T]:
    """The same values by `unwrapped` names.

    Args:
        what: begins the error message.

    Raises:
        UserError: two names differ in the prefixes of wrappers alone.
    """
    names: dict[str, str] = {}
    for name in named:
        if (other := names.setdefault(unwrapped(name), name)) != name:
            raise UserError(
                f"{what}: {other!r} and {name!r} are one name, {unwrapped(name)!r}, without the prefixes of "
                "torch.compile and of data parallelism; expected each parameter once"
            )
    return {name: named[given] for name, given in names.items()}
