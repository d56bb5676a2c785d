"""The processes of a run that is spread over several: what they share out, and what they add up.

Without `torch.distributed` there is one, and every function here gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if _several() else 0


def shard(items: Sequence[T]) -> list[T]:
    """Every count-th item, from this process's number on."""
    return list(items[rank() :: world_size()])


def unshard(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items whose shares, by process, these are."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, the same bits in each. One message for each dtype."""
    if not _several():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce(*values: float, device: torch.device | str = "cpu") -> tuple[float, ...]:
    """Sums over all processes, added in float64."""
    if not _several():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return tuple(sums.tolist())


def all_gather(rows: Tensor) -> Tensor:
    """(N, ...) of this process to the rows of all, in the order of the processes. N may differ from one to another."""
    if not _several():
        return rows
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
    sizes[rank()] = len(rows)
    distributed.all_reduce(sizes)
    most = int(sizes.max())
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])


def gather_shards(items: list[T]) -> list[T]:
    """What `share` parted, together again in every process."""
    if not _several():
        return items
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, items)
    return unshard(parts)


def broadcast_object(value: T) -> T:
    """The first process's value, in every process."""
    if not _several():
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box)
    return box[0]
