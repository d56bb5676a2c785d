"""Reads untrusted torch and safetensors files without executing code in them."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.regular_files import require_regular

UNREADABLE = (
    *(OSError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
    *(RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError),
    *(MemoryError, OverflowError),
)
"""Errors that torch raises for damaged pickles, which it does not validate."""


def load_file(path: Path, expected: str) -> Any:
    """Loads a safetensors file, by its suffix, or a torch file, with weights_only=True and memory-mapped if possible.

    Args:
        expected: what the file should be, for the error message.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors import torch as safe

    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            return safe.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, *UNREADABLE) as error:
        reason = "it is a folder" if path.is_dir() else str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{path}: expected {expected}; cannot read it: {reason}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        UserError: it cannot be read, or contains anything but named tensors.
    """
    state = load_file(path, "a file of tensors, by torch or safetensors")
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise UserError(f"{path}: expected a flat table of tensors, found {type(state).__name__} with other things")
    return state
