"""The checks of ops over lists of tensors: dtype, shape, device, layout, aliasing. Errors name the tensor at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import dispatch

STATE = (torch.float32,)
PARAM = (torch.float32, torch.bfloat16, torch.float16)
ADDRESS, ELEMENTS, KIND, LAYOUT = range(4)
"""Columns of a `table`."""


@cache
def _exchange() -> tuple[Any, Any] | None:
    """The compiled core and torch's DLPack exchange API (torch 2.10 or newer), which it reads tensors through."""
    core, api = dispatch.core("cpp"), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if core is None or api is None:
        return None
    try:
        core.describe(api, [])
    except (TypeError, ValueError):  # of another version: the checks in Python say the same, and take longer
        return None
    return core, api


@cache
def _require_memory(kind: type) -> None:
    """Refuses a class whose objects are no tensors, or that dispatches by itself as wrappers around tensors do."""
    if kind is type(None):
        return
    if not issubclass(kind, Tensor):
        raise UserError(f"a list of tensors holds a {kind.__name__}; expected tensors")
    if any("__torch_dispatch__" in vars(one) for one in kind.__mro__[: kind.__mro__.index(Tensor)]):
        raise UserError(
            f"a {kind.__name__} has no memory that a kernel could work on; expected plain tensors, such as "
            "DTensor.to_local() gives"
        )


def table(tensors: Sequence[Tensor | None]) -> numpy.ndarray:
    """(tensors, 4) int64: address, elements, a number for dtype and device, and one for shape and strides.

    A row of -1 is no dense strided tensor, None among them. Numbers of one process are comparable, no others.

    Raises:
        UserError: something is no tensor, or a wrapper around others, such as a DTensor, without memory of its own.
    """
    for kind in set(map(type, tensors)):
        _require_memory(kind)
    if (found := _exchange()) is not None:
        core, api = found
        return core.describe(api, list(tensors))
    rows = [_row(tensor) if tensor is not None and _dense(tensor) else (-1,) * 4 for tensor in tensors]
    return numpy.array(rows, dtype=numpy.int64).reshape(-1, 4)


def _row(tensor: Tensor) -> tuple[int, int, int, int]:
    strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1 and tensor.numel()]
    shape = hash((tuple(tensor.shape), tuple(strides)))
    return tensor.data_ptr(), tensor.numel(), hash((str(tensor.dtype), str(tensor.device))), shape


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory without gaps, in whatever order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def tables(op: str, lists: Mapping[str, Sequence[Tensor]], roles: Mapping[str, str]) -> dict[str, numpy.ndarray]:
    """The `table` of every list, once dtypes, shapes, devices and layouts are seen to fit.

    Raises:
        UserError: as `metadata` and `layout`.
    """
    found = {name: table(tensors) for name, tensors in lists.items()}
    base, *_ = found.values()
    same = all(
        len(rows) == len(base)
        and (rows[:, KIND] == rows[0, KIND]).all()
        and (rows[:, LAYOUT] == base[:, LAYOUT]).all()
        and (rows[:, LAYOUT] != -1).all()
        for rows in found.values()
    )
    # Numbers tell that all are alike; which one is not, and whether what all share is allowed, the tensors tell.
    ends = lists if not same else {name: tensors[:1] for name, tensors in lists.items()}
    metadata(op, ends, roles)
    if not same:
        layout(op, lists)
    return found


def metadata(op: str, lists: Mapping[str, Sequence[Tensor]], roles: Mapping[str, str]) -> None:
    """Checks lengths, shapes, dtypes and devices against the first list.

    Args:
        lists: argument name to its tensors.
        roles: argument name to one letter: "s" float32 state; other letters float32, bfloat16 or float16, one dtype a
            letter, and one 16-bit dtype among them.

    Raises:
        UserError: names the first tensor at fault, what was expected and what came.
    """
    (first, base), *_ = lists.items()
    shapes = [tensor.shape for tensor in base]
    device = base[0].device
    dtypes: dict[str, torch.dtype] = {}
    for name, tensors in lists.items():
        if len(tensors) != len(base):
            raise UserError(f"{op}: {name} has {len(tensors)} tensors; expected {len(base)}, as many as {first}")
        role = roles[name]
        dtype = dtypes.setdefault(role, torch.float32 if role == "s" else tensors[0].dtype)
        allowed = STATE if role == "s" else PARAM
        if (
            dtype in allowed
            and {tensor.dtype for tensor in tensors} == {dtype}
            and {tensor.device for tensor in tensors} == {device}
            and [tensor.shape for tensor in tensors] == shapes
        ):
            continue
        for i, tensor in enumerate(tensors):
            what, fellow = f"{op}: {name}[{i}]", f"that of {first}"
            require(what, tensor, (dtype,) if dtype in allowed else allowed, shapes[i], device, fellow, i)
    one_narrow(op, {name: dtypes[roles[name]] for name in lists})


def one_narrow(op: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Checks that the lists' 16-bit dtypes are one: no kernel mixes them.

    Raises:
        UserError: one list is bfloat16, and another float16.
    """
    narrow: dict[torch.dtype, str] = {}
    for name, dtype in dtypes.items():
        if dtype != torch.float32:
            narrow.setdefault(dtype, name)
    if len(narrow) > 1:
        (dtype, name), (other, found) = narrow.items()
        raise UserError(f"{op}: {found} has dtype {other}; expected torch.float32 or {dtype}, that of {name}")


def require(
    what: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: torch.Size,
    device: torch.device,
    fellow: str,
    index: int,
) -> None:
    """Checks one tensor.

    Raises:
        UserError: its dtype is none of ``dtypes``, or its shape or device is another.
    """
    if tensor.dtype not in dtypes:
        raise UserError(f"{what} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise UserError(f"{what} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, {fellow}[{index}]")
    if tensor.device != device:
        raise UserError(f"{what} has device {tensor.device}; expected {device}, {fellow}[0]")


def layout(op: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Checks that element k of every operand lies at place k of its memory.

    Raises:
        UserError: a tensor has gaps, or its strides differ from those of its fellows.
    """
    if all(tensor.is_contiguous() for tensors in lists.values() for tensor in tensors):
        return
    (first, base), *_ = lists.items()
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if not _dense(tensor):
                raise UserError(
                    f"{op}: {name}[{i}] has gaps or is not strided; expected a dense layout, see contiguous()"
                )
            if tensor.stride() != base[i].stride():
                raise UserError(
                    f"{op}: {name}[{i}] has strides {tensor.stride()}; expected {base[i].stride()}, "
                    f"those of {first}[{i}]"
                )


def spans(rows: numpy.ndarray, itemsize: int) -> numpy.ndarray:
    """(tensors, 2) int64: the first byte of each tensor, and the one behind its last."""
    return numpy.stack([rows[:, ADDRESS], rows[:, ADDRESS] + itemsize * rows[:, ELEMENTS]], 1)


def alone(
    op: str, lists: Mapping[str, Sequence[Tensor]], found: Mapping[str, numpy.ndarray], written: Sequence[str]
) -> numpy.ndarray:
    """The `spans` of what is written, sorted, once none of it overlaps anything else.

    Raises:
        UserError: two tensors share memory and the op writes at least one of them.
    """
    places = numpy.concatenate([spans(found[name], tensors[0].element_size()) for name, tensors in lists.items()])
    count = len(next(iter(found.values())))
    writes = numpy.repeat([name in written for name in lists], count)
    order = numpy.flatnonzero(places[:, 0] < places[:, 1])
    order = order[numpy.argsort(places[order, 0], kind="stable")]
    (start, end), write = places[order].T, writes[order]
    reach = numpy.maximum.accumulate(end)[:-1]
    written_reach = numpy.maximum.accumulate(numpy.where(write, end, 0))[:-1]
    clash = (start[1:] < written_reach) | (write[1:] & (start[1:] < reach))
    if clash.any():
        name, tensor = divmod(int(order[1:][clash][0]), count)
        raise _shared(op, list(lists)[name], tensor, written)
    return places[order][write]


def apart(op: str, name: str, mine: numpy.ndarray, theirs: numpy.ndarray, written: Sequence[str]) -> None:
    """Checks that no span of the list ``name`` overlaps one of ``theirs``, which are sorted and apart.

    Raises:
        UserError: one does.
    """
    if len(theirs):
        last = numpy.searchsorted(theirs[:, 0], mine[:, 1]) - 1  # the last of theirs that begins before mine ends
        clash = (last >= 0) & (theirs[last, 1] > mine[:, 0]) & (mine[:, 0] < mine[:, 1])
        if clash.any():
            raise _shared(op, name, int(clash.argmax()), written)


def _shared(op: str, name: str, tensor: int, written: Sequence[str]) -> UserError:
    return UserError(
        f"{op}: {name}[{tensor}] shares memory with another argument; "
        f"{', '.join(written)} are written in place and must stand alone"
    )
