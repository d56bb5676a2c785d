"""Checks of lists of tensors: dtype, shape, device, strides, shared memory. Errors name the tensor."""

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
"""Columns of `table`."""


@cache
def _exchange() -> tuple[Any, Any] | None:
    """The compiled core and torch's DLPack exchange API (torch 2.10 or newer), which it reads tensors through."""
    core, api = dispatch.core("cpp"), getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if core is None or api is None:
        return None
    try:
        core.describe(api, [])
    except (TypeError, ValueError):  # another version: the checks in Python are equivalent and slower
        return None
    return core, api


@cache
def require_memory(kind: type) -> None:
    """Refuses a class that is no tensor, or a tensor subclass with a __torch_dispatch__: a wrapper without storage."""
    if kind is type(None):
        return
    if not issubclass(kind, Tensor):
        raise UserError(f"a list of tensors holds a {kind.__name__}; expected tensors")
    if any("__torch_dispatch__" in vars(one) for one in kind.__mro__[: kind.__mro__.index(Tensor)]):
        raise UserError(
            f"a {kind.__name__} has no storage that a kernel could read; expected plain tensors, as "
            "DTensor.to_local() returns"
        )


def table(tensors: Sequence[Tensor | None]) -> numpy.ndarray:
    """(tensors, 4) int64: address, elements, a hash of dtype and device, and one of shape and strides.

    What is no dense strided tensor, such as None, has a row of -1. Hashes are comparable within a process only.

    Raises:
        UserError: something is no tensor, or a wrapper without storage of its own, such as a DTensor.
    """
    for kind in set(map(type, tensors)):
        require_memory(kind)
    if (found := _exchange()) is not None:
        core, api = found
        return core.describe(api, list(tensors))
    rows = [_row(tensor) if tensor is not None and dense(tensor) else (-1,) * 4 for tensor in tensors]
    return numpy.array(rows, dtype=numpy.int64).reshape(-1, 4)


def _row(tensor: Tensor) -> tuple[int, int, int, int]:
    strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1 and tensor.numel()]
    shape = hash((tuple(tensor.shape), tuple(strides)))
    return tensor.data_ptr(), tensor.numel(), hash((str(tensor.dtype), str(tensor.device))), shape


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous range of memory, in any order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected and tensor.numel():
            return False
        expected *= size
    return True


def tables(op: str, lists: Mapping[str, Sequence[Tensor]], roles: Mapping[str, str]) -> dict[str, numpy.ndarray]:
    """The `table` of every list, after checks of dtypes, shapes, devices and strides.

    Raises:
        UserError: as `require_metadata` and `require_layout`.
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
    # Equal hashes show that all are alike; the slower checks find which one is not, and whether the dtype is allowed.
    ends = lists if not same else {name: tensors[:1] for name, tensors in lists.items()}
    require_metadata(op, ends, roles)
    if not same:
        require_layout(op, lists)
    return found


def require_metadata(op: str, lists: Mapping[str, Sequence[Tensor]], roles: Mapping[str, str]) -> None:
    """Checks lengths, shapes, dtypes and devices against the first list.

    Args:
        lists: argument name to its tensors.
        roles: argument name to one letter: "s" float32 state; other letters float32, bfloat16 or float16, one dtype a
            letter, and one 16-bit dtype among them.

    Raises:
        UserError: names the first tensor that does not fit, what was expected and what came.
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
            what, peer = f"{op}: {name}[{i}]", f"that of {first}"
            require_tensor(what, tensor, (dtype,) if dtype in allowed else allowed, shapes[i], device, peer, i)
    require_one_16_bit_dtype(op, {name: dtypes[roles[name]] for name in lists})


def require_one_16_bit_dtype(op: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Checks that the lists have at most one 16-bit dtype: no kernel mixes them.

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


def require_tensor(
    what: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: torch.Size,
    device: torch.device,
    peer: str,
    index: int,
) -> None:
    """Checks one tensor.

    Raises:
        UserError: its dtype is none of ``dtypes``, or its shape or device differs.
    """
    if tensor.dtype not in dtypes:
        raise UserError(f"{what} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if tensor.shape != shape:
        raise UserError(f"{what} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, {peer}[{index}]")
    if tensor.device != device:
        raise UserError(f"{what} has device {tensor.device}; expected {device}, {peer}[0]")


def require_layout(op: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Checks that tensors of one index have the same dense strides.

    Raises:
        UserError: a tensor has gaps, or its strides differ from those of the others of its index.
    """
    if all(tensor.is_contiguous() for tensors in lists.values() for tensor in tensors):
        return
    (first, base), *_ = lists.items()
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if not dense(tensor):
                raise UserError(
                    f"{op}: {name}[{i}] has gaps or is not strided; expected a dense layout, see contiguous()"
                )
            if tensor.stride() != base[i].stride():
                raise UserError(
                    f"{op}: {name}[{i}] has strides {tensor.stride()}; expected {base[i].stride()}, "
                    f"those of {first}[{i}]"
                )


def spans(rows: numpy.ndarray, itemsize: int) -> numpy.ndarray:
    """(tensors, 2) int64: address of each tensor's first byte, and of the one after its last."""
    return numpy.stack([rows[:, ADDRESS], rows[:, ADDRESS] + itemsize * rows[:, ELEMENTS]], 1)


def require_disjoint(
    op: str, lists: Mapping[str, Sequence[Tensor]], found: Mapping[str, numpy.ndarray], written: Sequence[str]
) -> numpy.ndarray:
    """The sorted `spans` of what is written, after a check that none of it overlaps anything else.

    Raises:
        UserError: two tensors share memory and the op writes at least one of them.
    """
    places = numpy.concatenate([spans(found[name], tensors[0].element_size()) for name, tensors in lists.items()])
    counts = [len(found[name]) for name in lists]
    writes = numpy.repeat([name in written for name in lists], counts)
    order = numpy.flatnonzero(places[:, 0] < places[:, 1])
    order = order[numpy.argsort(places[order, 0], kind="stable")]
    (start, end), write = places[order].T, writes[order]
    reach = numpy.maximum.accumulate(end)[:-1]
    written_reach = numpy.maximum.accumulate(numpy.where(write, end, 0))[:-1]
    clash = (start[1:] < written_reach) | (write[1:] & (start[1:] < reach))
    if clash.any():
        place = int(order[1:][clash][0])
        ends = numpy.cumsum(counts)
        which = int(numpy.searchsorted(ends, place, side="right"))
        raise _overlap(op, list(lists)[which], place - int(ends[which]) + counts[which], written)
    return places[order][write]


def require_disjoint_from(
    op: str, name: str, own: numpy.ndarray, others: numpy.ndarray, written: Sequence[str]
) -> None:
    """Checks that no span of the list ``name`` overlaps one of ``others``, which are sorted and disjoint.

    Raises:
        UserError: one does.
    """
    if len(others):
        last = numpy.searchsorted(others[:, 0], own[:, 1]) - 1  # the last of the others that begins before this ends
        clash = (last >= 0) & (others[last, 1] > own[:, 0]) & (own[:, 0] < own[:, 1])
        if clash.any():
            raise _overlap(op, name, int(clash.argmax()), written)


def _overlap(op: str, name: str, tensor: int, written: Sequence[str]) -> UserError:
    return UserError(
        f"{op}: {name}[{tensor}] shares memory with another argument; "
        f"{', '.join(written)} are written in place; pass tensors with memory of their own, see clone()"
    )
