"""Reference implementations of the ops in `cnext.ops.kron`, in plain torch.

They compute in the dtype of the factors: with float64 factors they are what the kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

Tensors = list[Tensor]


def side_by_side(tensors: Tensors, axes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """The matrices of one group as (n, r). axes: the dimension of each that is its rank."""
    return torch.cat([(t if axis else t.T).to(dtype or t.dtype) for t, axis in zip(tensors, axes, strict=True)], 1)


def _groups(parts: Sequence[int]) -> Iterator[slice]:
    """The places of each group's matrices in a list over parts."""
    return (slice(end - count, end) for end, count in zip(accumulate(parts), parts, strict=True))


def _write(tensors: Tensors, axes: Sequence[int], values: Tensor) -> None:
    """Writes (n, r) back into the matrices of a group."""
    begin = 0
    for tensor, axis in zip(tensors, axes, strict=True):
        rank = tensor.shape[axis]
        part = values[:, begin : begin + rank]
        tensor.copy_(part if axis else part.T)
        begin += rank


def kron_accumulate_(rows: Tensors, factor: Tensors, grad: Tensors, parts: Sequence[int], axes: Sequence[int]) -> None:
    for s, r, at in zip(rows, factor, _groups(parts), strict=True):
        g = side_by_side(grad[at], axes[at], s.dtype)
        squares = g.square().sum(1)
        use = squares.isfinite()
        g = torch.where(use[:, None], g, 0.0)
        s.add_(torch.where(use, squares, 0.0))
        r.add_(g.T @ g)


def kron_pull_(
    theta: Tensors,
    theta_start: Tensors,
    rows: Tensors,
    values: Tensors,
    vectors: Tensors,
    parts: Sequence[int],
    axes: Sequence[int],
    *,
    weight: float,
) -> None:
    for s, v, q, at in zip(rows, values, vectors, _groups(parts), strict=True):
        now, start = (side_by_side(tensors[at], axes[at], s.dtype) for tensors in (theta, theta_start))
        _write(theta[at], axes[at], start + ((now - start) @ q / (1 + weight * s[:, None] * v)) @ q.T)


def kron_merge_(
    theta: Tensors,
    theta_start: Tensors,
    rows_new: Tensors,
    factor_new: Tensors,
    rows_old: Tensors,
    factor_old: Tensors,
    parts: Sequence[int],
    axes: Sequence[int],
    *,
    c: float,
    damping: float,
) -> None:
    groups = zip(rows_new, factor_new, rows_old, factor_old, _groups(parts), strict=True)
    for s_new, r_new, s_old, r_old, at in groups:
        # Solved in float64: the blocks of a row may differ by many orders of magnitude.
        now, start = (side_by_side(tensors[at], axes[at], torch.float64) for tensors in (theta, theta_start))
        m = (s_old.double() / c)[:, None, None] * r_old.double()
        f = s_new.double()[:, None, None] * r_new.double()
        m_gap = torch.einsum("nij,nj->ni", m, start - now)
        moved = torch.linalg.solve(f + m + damping * torch.eye(len(r_new), dtype=f.dtype, device=f.device), m_gap)
        _write(theta[at], axes[at], now + moved)
