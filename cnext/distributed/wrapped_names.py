"""Names of parameters without the prefixes that wrappers of modules put before them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from cnext.errors import UserError

T = TypeVar("T")

ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name that torch.compile, FSDP and activation checkpointing add wherever they wrap a module."""
FIRST = "module"
"""The first part, of DistributedDataParallel, DataParallel and DeepSpeed. Elsewhere it may be a module of the model."""


def unwrapped(name: str) -> str:
    """A parameter's name without the prefixes of wrappers, a first "module." included.

    Example:
        >>> unwrapped("module._orig_mod.layers.0.weight"), unwrapped("layers._orig_mod.0.module.weight")
        ('layers.0.weight', 'layers.0.module.weight')
    """
    name = _without_parts(name)
    while name.startswith(f"{FIRST}."):
        name = name.removeprefix(f"{FIRST}.")
    return name


def _without_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ANYWHERE)


def without_wrappers(named: Mapping[str, T], what: str, known: Collection[str] = ()) -> dict[str, T]:
    """The same values by names without the prefixes of wrappers.

    A first "module." is a wrapper's where all names begin with it; otherwise the model has a child of that name.

    Args:
        what: begins the error message.
        known: names without prefixes. Where they have all the names in them, a first "module." is the model's own.

    Raises:
        UserError: two names differ in the prefixes of wrappers alone.
    """
    plain = {name: _without_parts(name) for name in named}
    while (
        plain and all(name.startswith(f"{FIRST}.") for name in plain.values()) and not set(plain.values()) <= set(known)
    ):
        plain = {given: name.removeprefix(f"{FIRST}.") for given, name in plain.items()}
    names: dict[str, str] = {}
    for name, short in plain.items():
        if (other := names.setdefault(short, name)) != name:
            raise UserError(
                f"{what}: {other!r} and {name!r} are one name, {short!r}, without the prefixes of torch.compile and "
                "of data parallelism; expected each parameter once"
            )
    return {name: named[given] for name, given in names.items()}
