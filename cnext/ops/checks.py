"""The checks of ops over lists of tensors: dtype, shape, device, layout, aliasing. Errors name the tensor at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

from cnext.errors import UserError

STATE = (torch.float32,)
PARAM = (torch.float32, torch.bfloat16, torch.float16)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory without gaps, in whatever order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


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
            what = f"{op}: {name}[{i}] has"
            if tensor.dtype not in allowed or tensor.dtype != dtype:
                expected = " or ".join(map(str, allowed if dtype not in allowed else (dtype,)))
                raise UserError(f"{what} dtype {tensor.dtype}; expected {expected}")
            if tensor.shape != shapes[i]:
                raise UserError(
                    f"{what} shape {tuple(tensor.shape)}; expected {tuple(shapes[i])}, that of {first}[{i}]"
                )
            if tensor.device != device:
                raise UserError(f"{what} device {tensor.device}; expected {device}, that of {first}[0]")
    narrow: dict[torch.dtype, str] = {}
    for name in lists:
        if (dtype := dtypes[roles[name]]) != torch.float32:
            narrow.setdefault(dtype, name)
    if len(narrow) > 1:
        (dtype, name), (other, found) = narrow.items()
        raise UserError(f"{op}: {found} has dtype {other}; expected torch.float32 or {dtype}, that of {name}")


def layout(op: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Checks that element k of every operand lies at place k of its memory.

    Raises:
        UserError: a tensor has gaps, or its strides differ from those of its fellows.
    """
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists.values()):
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


def addresses(
    op: str, lists: Mapping[str, Sequence[Tensor]], sizes: numpy.ndarray, written: Sequence[str]
) -> numpy.ndarray:
    """The data pointers, (arguments, tensors) int64, once none that is written overlaps another.

    Args:
        sizes: (tensors,) elements, of every list alike.

    Raises:
        UserError: two tensors share memory and the op writes at least one of them.
    """
    pointers = numpy.array([[t.data_ptr() for t in tensors] for tensors in lists.values()], dtype=numpy.int64)
    itemsizes = numpy.array([tensors[0].itemsize for tensors in lists.values()], dtype=numpy.int64)
    nbytes = itemsizes[:, None] * sizes
    writes = numpy.repeat([name in written for name in lists], pointers.shape[1])
    order = numpy.flatnonzero(nbytes.ravel())
    order = order[numpy.argsort(pointers.ravel()[order], kind="stable")]
    start, end, write = pointers.ravel()[order], (pointers + nbytes).ravel()[order], writes[order]
    reach = numpy.maximum.accumulate(end)[:-1]
    written_reach = numpy.maximum.accumulate(numpy.where(write, end, 0))[:-1]
    clash = (start[1:] < written_reach) | (write[1:] & (start[1:] < reach))
    if clash.any():
        name, tensor = divmod(int(order[1:][clash][0]), pointers.shape[1])
        raise UserError(
            f"{op}: {list(lists)[name]}[{tensor}] shares memory with another argument; "
            f"{', '.join(written)} are written in place and must stand alone"
        )
    return pointers
