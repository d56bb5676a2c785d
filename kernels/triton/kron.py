"""Triton kernels of the Kronecker ops: many groups of matrices in one launch, by tables of addresses in device memory.

A program works on some rows of one group. A column of the group has an address and a stride of its own, so that every
layout is read by the same code; what is transposed is read as (columns, rows), with neighbors in memory side by side.
Sums are in a fixed order, without atomics: `combine` adds the parts of a factor in the order of the programs.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy
import torch
from cnext.kernels.averaging import TYPES, Tables

import triton
import triton.language as tl

SIZES = {
    "kron_accumulate": {"ROWS": 1024, "BLOCK": 16},
    "kron_pull": {"ROWS": 16, "BLOCK": 16},
    "kron_merge": {"ROWS": 16, "BLOCK": 1},
}
"""Rows of a program, and those that it works on at a time."""
WARPS = {
    "kron_accumulate": {16: 4, 32: 8, 64: 8},
    "kron_pull": {16: 4, 32: 8, 64: 8},
    "kron_merge": {16: 1, 32: 4, 64: 8},
}
"""Warps of a program, by the width of its groups: without spills."""
COMBINED = 256
"""Elements of a factor that a program of `combine` adds."""
_jit = triton.jit(do_not_specialize=["matrices", "groups"])


@triton.jit
def _place(sizes, block_group, block_begin, ROWS: tl.constexpr):
    """This program's group, its first row, the one after its last, the group's r, and whether it is transposed."""
    group = tl.load(block_group + tl.program_id(0))
    begin = tl.load(block_begin + tl.program_id(0))
    end = tl.minimum(begin + ROWS, tl.load(sizes + group * 3))
    return group, begin, end, tl.load(sizes + group * 3 + 1), tl.load(sizes + group * 3 + 2) != 0


@triton.jit
def _column(addresses, columns, k, group, matrices, column, R: tl.constexpr, TYPE: tl.constexpr):
    """Addresses of the first row of columns of a group, and the strides between rows."""
    row = columns + (group * R + column) * 3
    base = tl.load(addresses + k * matrices + tl.load(row)).to(tl.pointer_type(TYPE))
    return base + tl.load(row + 1), tl.load(row + 2)


@triton.jit
def _numbers(addresses, k, group, groups, TYPE: tl.constexpr = tl.float32):
    return tl.load(addresses + k * groups + group).to(tl.pointer_type(TYPE))


@triton.jit
def _tile(first, stride, inside, rows, end, transposed):
    """(rows, columns) in float32, 0 outside of the group."""
    if transposed:
        across = inside[:, None] & (rows < end)[None, :]
        x = tl.trans(tl.load(first[:, None] + stride[:, None] * rows[None, :], across, 0.0).to(tl.float32))
    else:
        down = (rows < end)[:, None] & inside[None, :]
        x = tl.load(first[None, :] + stride[None, :] * rows[:, None], down, 0.0).to(tl.float32)
    return x


@triton.jit
def _put_sum(to, start, more, mask):
    tl.store(to, (tl.load(start, mask, 0.0).to(tl.float32) + more).to(to.dtype.element_ty), mask)


@triton.jit
def _square(values, r, R: tl.constexpr):
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    return tl.load(values + i * r + j, (i < r) & (j < r), 0.0)


@_jit
def kron_accumulate(addresses, columns, sizes, block_group, block_begin, matrices, groups, partial, TYPE: tl.constexpr,
                    R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    group, begin, end, r, transposed = _place(sizes, block_group, block_begin, ROWS)
    column = tl.arange(0, R)
    first, stride = _column(addresses, columns, 0, group, matrices, column, R, TYPE)
    row_sums = _numbers(addresses + matrices, 0, group, groups)
    total = tl.zeros((R, R), tl.float32)
    for row in range(begin, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        x = _tile(first, stride, column < r, rows, end, transposed)
        squares = tl.sum(x * x, 1)
        use = squares < float("inf")
        before = tl.load(row_sums + rows, rows < end, 0.0)
        tl.store(row_sums + rows, before + tl.where(use, squares, 0.0), rows < end)
        x = tl.where(use[:, None], x, 0.0)
        total = tl.dot(tl.trans(x), x, total, input_precision="ieee")
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    tl.store(partial + tl.program_id(0).to(tl.int64) * (R * R) + i * R + j, total)


@_jit
def combine(addresses, sizes, first_block, matrices, groups, partial, R: tl.constexpr, BLOCK: tl.constexpr):
    group, r = tl.program_id(0), tl.load(sizes + tl.program_id(0) * 3 + 1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = at // R, at % R
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(tl.load(first_block + group), tl.load(first_block + group + 1)):
        total += tl.load(partial + block * (R * R) + at).to(tl.float64)
    factor = _numbers(addresses + matrices, 1, group, groups) + i * r + j
    inside = (i < r) & (j < r)
    tl.store(factor, (tl.load(factor, inside, 0.0).to(tl.float64) + total).to(tl.float32), inside)


@_jit
def kron_pull(addresses, columns, sizes, block_group, block_begin, matrices, groups, TYPE: tl.constexpr,
              R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    group, begin, end, r, transposed = _place(sizes, block_group, block_begin, ROWS)
    rows, column = begin + tl.arange(0, BLOCK), tl.arange(0, R)
    numbers = addresses + 2 * matrices
    vectors, inside = _numbers(numbers, 2, group, groups), column < r
    turned = tl.zeros((BLOCK, R), tl.float32)
    # Without tensor cores all of a product's inner dimension is in registers at once: 16 columns at a time.
    for k in tl.static_range(0, R, 16):
        some = k + tl.arange(0, 16)
        first, stride = _column(addresses, columns, 0, group, matrices, some, R, TYPE)
        gap = _tile(first, stride, some < r, rows, end, transposed)
        first, stride = _column(addresses, columns, 1, group, matrices, some, R, TYPE)
        gap -= _tile(first, stride, some < r, rows, end, transposed)
        shares = tl.load(vectors + some[:, None] * r + column[None, :], (some < r)[:, None] & inside[None, :], 0.0)
        turned = tl.dot(gap, shares, turned, input_precision="ieee")
    weight = tl.load(numbers + 3 * groups).to(tl.float64, bitcast=True).to(tl.float32)
    scale = weight * tl.load(_numbers(numbers, 0, group, groups) + rows, rows < end, 0.0)
    values = tl.load(_numbers(numbers, 1, group, groups) + column, inside, 0.0)
    turned = tl.reshape(turned / (1.0 + scale[:, None] * values[None, :]), (BLOCK, R // 16, 16))
    product = tl.zeros((BLOCK, R), tl.float32)
    for k in tl.static_range(0, R, 16):
        some = k + tl.arange(0, 16)
        mine = tl.sum(tl.where(tl.arange(0, R // 16)[None, :, None] == k // 16, turned, 0.0), 1)
        shares = tl.load(vectors + column[None, :] * r + some[:, None], (some < r)[:, None] & inside[None, :], 0.0)
        product = tl.dot(mine, shares, product, input_precision="ieee")
    theta, stride = _column(addresses, columns, 0, group, matrices, column, R, TYPE)
    start, _ = _column(addresses, columns, 1, group, matrices, column, R, TYPE)
    if transposed:
        across = stride[:, None] * rows[None, :]
        mask = inside[:, None] & (rows < end)[None, :]
        _put_sum(theta[:, None] + across, start[:, None] + across, tl.trans(product), mask)
    else:
        down = stride[None, :] * rows[:, None]
        _put_sum(theta[None, :] + down, start[None, :] + down, product, (rows < end)[:, None] & inside[None, :])


@_jit
def kron_merge(addresses, columns, sizes, block_group, block_begin, matrices, groups, TYPE: tl.constexpr,
               R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gauss-Jordan elimination in float64, without pivoting: the systems are symmetric and positive definite."""
    group, begin, end, r, _ = _place(sizes, block_group, block_begin, ROWS)
    index = tl.arange(0, R)
    theta, stride = _column(addresses, columns, 0, group, matrices, index, R, TYPE)
    theta_start, _ = _column(addresses, columns, 1, group, matrices, index, R, TYPE)
    numbers = addresses + 2 * matrices
    c = tl.load(numbers + 4 * groups).to(tl.float64, bitcast=True)
    i, j = index[:, None], index[None, :]
    for row in range(begin, end):
        now = tl.load(theta + stride * row, index < r, 0.0).to(tl.float64)
        gap = tl.load(theta_start + stride * row, index < r, 0.0).to(tl.float64) - now
        kept = tl.load(_numbers(numbers, 2, group, groups) + row).to(tl.float64) / c
        m = kept * _square(_numbers(numbers, 3, group, groups, tl.float64), r, R)
        fresh = tl.load(_numbers(numbers, 0, group, groups) + row).to(tl.float64)
        system = fresh * _square(_numbers(numbers, 1, group, groups, tl.float64), r, R) + m
        # Read here, so that no tile of it is kept in registers over the loop.
        damping = tl.load(numbers + 4 * groups + 1).to(tl.float64, bitcast=True)
        # Rows of the identity fill up the system.
        system += tl.where(i == j, tl.where(i < r, damping, 1.0), 0.0)
        right = tl.sum(m * gap[None, :], 1)
        for k in range(r):
            pivot_row = tl.sum(tl.where(i == k, system, 0.0), 0)
            pivot = tl.sum(tl.where(index == k, pivot_row, 0.0), 0)
            share = tl.where(index == k, 0.0, tl.sum(tl.where(j == k, system, 0.0), 1) / pivot)
            system -= share[:, None] * pivot_row[None, :]
            right -= share * tl.sum(tl.where(index == k, right, 0.0), 0)
        moved = right / tl.sum(tl.where(i == j, system, 0.0), 1)
        tl.store(theta + stride * row, (now + moved).to(tl.float32).to(TYPE), index < r)


KERNELS = {"kron_accumulate": kron_accumulate, "kron_pull": kron_pull, "kron_merge": kron_merge}


class Groups(Tables):
    """The groups and matrices of a call, as tables in device memory.

    Args:
        groups, parts: as in `cnext.ops.kron.Layout`.
        rows: of a program.
    """

    remedy = "call the op once with the same tensors before the capture"

    def __init__(self, groups: numpy.ndarray, parts: numpy.ndarray, rows: int, device: torch.device) -> None:
        n, r, first, _ = groups.T
        rank, along_n, along_rank = parts.T
        self.width = max(16, triton.next_power_of_2(int(r.max())))
        # Of each column of each group: its matrix, its offset in it, and the stride along n, in elements.
        matrix = numpy.repeat(numpy.arange(len(parts)), rank)
        within = numpy.arange(len(matrix)) - numpy.repeat(rank.cumsum() - rank, rank)
        group = numpy.repeat(numpy.arange(len(groups)), r)
        place = numpy.arange(len(matrix)) - numpy.repeat(r.cumsum() - r, r)
        columns = numpy.zeros((len(groups), self.width, 3), numpy.int64)
        columns[group, place] = numpy.stack([matrix, within * along_rank[matrix], along_n[matrix]], 1)
        transposed = numpy.add.reduceat(numpy.where(along_rank > 1, rank, 0), first) * 2 > r
        count = -(-n // rows)
        begin = numpy.concatenate([[0], count.cumsum()])
        of = numpy.repeat(numpy.arange(len(groups)), count)
        self.blocks = len(of)
        starts = (numpy.arange(self.blocks) - begin[of]) * rows
        sizes = numpy.stack([n, r, transposed], 1)
        tables = (columns, sizes, of.astype(numpy.int32), starts, begin)
        super().__init__(tables, device)


@lru_cache(8)  # a model has one set of groups, or a few
def _groups(op: str, groups: bytes, parts: bytes, device: torch.device) -> Groups:
    tables = (numpy.frombuffer(table, numpy.int64).reshape(-1, width) for table, width in ((groups, 4), (parts, 3)))
    return Groups(*tables, SIZES[op]["ROWS"], device)


def run(op: str, layout: Any, parts: numpy.ndarray, groups: numpy.ndarray, scalars: list[float]) -> None:
    """Runs an op. layout: a `cnext.ops.kron.Layout`, whose device the tensors are on."""
    tables = _groups(op, layout.groups.tobytes(), layout.parts.tobytes(), layout.device)
    # Scalars are arguments in float32 only: here they are bits in the table of addresses.
    numbers = numpy.asarray(scalars, numpy.float64).view(numpy.int64)
    with torch.cuda.device(layout.device) if layout.device.type == "cuda" else nullcontext():
        addresses, columns, sizes, of, begin, first = tables.on_device(
            numpy.concatenate([parts.ravel(), groups.ravel(), numbers])
        )
        counts = parts.shape[1], groups.shape[1]
        partial = []
        if op == "kron_accumulate":
            shape = tables.blocks, tables.width, tables.width
            partial = [torch.empty(shape, dtype=torch.float32, device=layout.device)]
        KERNELS[op][(tables.blocks,)](
            addresses, columns, sizes, of, begin, *counts, *partial,
            TYPE=TYPES[layout.letter], R=tables.width, **SIZES[op], num_warps=WARPS[op][tables.width],
        )  # fmt: skip
        if partial:
            grid = counts[1], tables.width**2 // COMBINED
            combine[grid](addresses, sizes, first, *counts, *partial, R=tables.width, BLOCK=COMBINED)
