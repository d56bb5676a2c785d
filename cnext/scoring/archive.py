"""The tensors of a TorchScript archive, read as data: nothing in it is run.

OpenAI publishes its CLIP weights as such archives: a zip with a program, a pickled tree of modules, and one member per
storage. Loading one the usual way compiles the program and builds what the pickle asks for. Here the few opcodes that
torch writes are followed one by one, a class is no more than its name, and only tensors are kept.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.tensor_files import UNREADABLE

STORAGES = {
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_VALUES = {"GLOBAL", "BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which torch.load refuses, and no plain file of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except UNREADABLE:
        return False


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive's modules by dotted name: parameters, buffers, and other attributes that are tensors.

    Raises:
        UserError: the file is damaged, or asks for what no module of tensors needs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _flat(_Reader(archive).read())
    except UNREADABLE as error:
        raise UserError(f"{path}: expected a TorchScript archive of modules and tensors: {error}") from error


class _Reader:
    """Follows the pickled tree of an archive's modules."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        (tree,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self.tree, self.root = tree, tree.removesuffix("/data.pkl")
        self.storages: dict[str, Tensor] = {}

    def _member(self, name: str) -> bytes:
        # What is stored as it is cannot unpack to more than the file has; torch compresses the program alone.
        if self.archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which torch does not do")
        return self.archive.read(name)

    def read(self) -> Any:
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items, stack[start:] = stack[start:], []
            return items

        for opcode, argument, _ in pickletools.genops(self._member(self.tree)):
            name = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name in _SHORT_TUPLES:
                count = _SHORT_TUPLES[name]
                stack[-count:] = [tuple(stack[-count:])]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name == "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            elif name == "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            elif name == "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            elif name == "NEWOBJ":  # a class and the arguments of its constructor: an object without attributes yet
                stack[-2:] = [{}]
            elif name == "BUILD":
                state = stack.pop()
                stack[-1].update(state)
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_tensor(*arguments[:4]) if function == _TENSOR else {})
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise ValueError(f"its tree of modules has the opcode {name}, which torch does not write")
        raise ValueError("its tree of modules is cut short")

    def _storage(self, reference: tuple[Any, ...]) -> Tensor:
        _, kind, key, _, count = reference
        if key not in self.storages:
            content = bytearray(self._member(f"{self.root}/data/{key}"))
            dtype = STORAGES[kind]
            # An empty buffer is one that torch.frombuffer refuses.
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            if len(self.storages[key]) != count:
                raise ValueError(f"{self.root}/data/{key} should hold {count} numbers")
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if math.prod(size) > len(storage):
        raise ValueError(f"a tensor of shape {size} does not fit in {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _flat(tree: Any) -> dict[str, Tensor]:
    """Tensors by dotted name. A module that stands in two places is taken once."""
    found: dict[str, Tensor] = {}
    waiting, seen = [("", tree)], {id(tree)}
    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))
    return found
