"""Read the tensors of a TorchScript archive, as OpenAI publishes its CLIP weights, without running its program.

torch.load refuses such archives with weights_only, and torch.jit.load compiles and runs what is in them. So the tensors
and the pickled tree of modules are copied without the program, and loaded with weights_only.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.regular_files import require_regular
from cnext.tensor_files import UNREADABLE


class _Module:
    """Stands for every class of an archive's program."""

    def __init__(self, *_: Any) -> None: ...


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except UNREADABLE:
        return False


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive's modules by dotted name: parameters, buffers, and other attributes that are tensors.

    Raises:
        UserError: the file is damaged, or asks for other classes than those of its program.
    """
    try:
        copy, sizes = _without_program(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(copy)
        copy.seek(0)
        own: list[Any] = [(_Module, name) for name in names if name.startswith(("__torch__.", "torch.jit._pickle."))]
        with torch.serialization.safe_globals(own):
            tensors = _flat(torch.load(copy, map_location="cpu", weights_only=True))
        stored = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors.values())}
        if Counter(stored.values()) - Counter(sizes):  # compared by recent releases of torch alone
            raise ValueError("the record size of a tensor is not what it should be")
        return tensors
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: expected a TorchScript archive of modules and tensors: {reason}") from error


def _without_program(path: Path) -> tuple[io.BytesIO, list[int]]:
    """The archive without its program, and the sizes of its records."""
    copy, sizes = io.BytesIO(), []
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for item in old.infolist():
            inner = item.filename.partition("/")[2]
            if inner not in ("data.pkl", "version", "byteorder") and not inner.startswith("data/"):
                continue
            # What is stored as it is cannot unpack to more than the file has; torch compresses the program alone.
            if item.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{item.filename} is compressed, which torch does not do")
            new.writestr(item.filename, old.read(item))
            sizes.append(item.file_size)
    copy.seek(0)
    return copy, sizes


def _flat(tree: Any) -> dict[str, Tensor]:
    """Tensors by dotted name. A module that stands in two places is taken once."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", tree)], {id(tree)}
    while waiting:
        prefix, module = waiting.pop()
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, _Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
    return found
