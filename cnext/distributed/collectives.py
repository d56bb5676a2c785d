"""Collective operations over the default process group of `torch.distributed`; the identity in a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def _initialized() -> bool:
    """Whether there is a process group of more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    """Rank of this process in the group, from 0; 0 without a group."""
    return distributed.get_rank() if _initialized() else 0


def shard(items: Sequence[T]) -> list[T]:
    """This rank's part of a sequence that all ranks have: items rank, rank + world_size, rank + 2 * world_size, ..."""
    return list(items[rank() :: world_size()])


def unshard(parts: Sequence[Sequence[T]]) -> list[T]:
    """The sequence of which these are the `shard`s, in the order of ranks."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        whole[index :: len(parts)] = part
    return whole


def all_reduce_(tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over all ranks, in place, as ``torch.distributed.all_reduce``: one call per dtype and device.

    Every rank passes tensors of the same shapes and dtypes, and gets the same bits.
    """
    if not _initialized():
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
    """Sums of numbers over all ranks, in float64. device: one that the group's backend can send from."""
    if not _initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return tuple(sums.tolist())


def all_gather(rows: Tensor) -> Tensor:
    """Concatenates the (N, ...) tensors of all ranks along dimension 0, in the order of ranks. N may differ by rank."""
    if not _initialized():
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
    """The inverse of `shard`: every rank passes its part and gets the whole sequence. Items are pickled."""
    if not _initialized():
        return items
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, items)
    return unshard(parts)


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank, as ``torch.distributed.broadcast_object_list``: pickled."""
    if not _initialized():
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box)
    return box[0]
