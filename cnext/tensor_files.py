"""Reads untrusted torch and safetensors files without executing code in them."""

from __future__ import annotations

import mmap
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError, listed
from cnext.regular_files import require_regular

UNREADABLE = (
    *(OSError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
    *(RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError),
    *(MemoryError, OverflowError),
)
"""Errors that torch raises for damaged pickles, which it does not validate."""


TIMES = 8
"""How much larger than its file its tensors may be together: those that are tied are in it once."""


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
        zipped = zipfile.is_zipfile(path)
        _refuse_bombs(path, zipped)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (SafetensorError, *UNREADABLE) as error:
        # torch begins with how to load a file that executes code.
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        reason = "it is a folder" if path.is_dir() else text.partition("\n")[0] or "it ends too early"
        raise UserError(f"{path}: expected {expected}; cannot read it: {reason}") from error


def _refuse_bombs(path: Path, zipped: bool) -> None:
    """Raises ValueError for a torch file that would unpack, or is asked for, more memory than it has bytes."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(item.compress_type != zipfile.ZIP_STORED for item in members):
                raise ValueError("it is compressed, which torch does not do")
            if sum(item.file_size for item in members) > path.stat().st_size:
                raise ValueError("its parts overlap")
            pickles = [archive.read(item) for item in members if item.filename.endswith(".pkl")]
        asks = any(b"bytearray\n" in content for content in pickles)
    elif not path.stat().st_size:
        raise EOFError
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            asks = content.find(b"bytearray\n") >= 0
    if asks:
        raise ValueError("it has a bytearray, which no file of tensors has")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        UserError: it cannot be read, or contains anything but named tensors, dense and with a value at every place.
    """
    state = load_file(path, "a file of tensors, by torch or safetensors")
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise UserError(f"{path}: expected a flat table of tensors, found {type(state).__name__} with other things")
    require_dense(path, state)
    return state


def require_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for tensors of a file that are not dense arrays, or of more values than the file has."""
    if strange := [f"{name} {reason}" for name, tensor in tensors.items() if (reason := _unusual(tensor))]:
        raise UserError(f"{path}: expected dense tensors with all of their values; {listed(strange)}; save them anew")
    total, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if total > TIMES * size:
        raise UserError(f"{path}: expected tensors of about its {size:,} bytes, they have {total:,}; save them anew")


def _unusual(tensor: Tensor) -> str:
    """How a tensor is not a dense array of values that are in its file, "" if it is one."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is nested" if tensor.is_nested else f"is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized or tensor.is_meta:
        return "is quantized" if tensor.is_quantized else "has no values (it is on the meta device)"
    if tensor.is_neg() or tensor.is_conj():
        return "is a negated or conjugated view"
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    return f"is {tuple(tensor.shape)} and repeats {stored} values" if stored < tensor.numel() else ""
