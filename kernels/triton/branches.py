"""The branches' passes over x and dX in Triton, dropout made from its seed on the way: nothing dropped is ever stored.

A program works on a block of rows; sums are float32 and in a fixed order, without atomics. The mask is that of
`cnext.ops.branches_reference.dropout_mask`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

import triton
import triton.language as tl

TILE = tl.constexpr(128)
SPLITS = 32
_jit = triton.jit(do_not_specialize=["rows", "threshold", "branch"])


@triton.jit
def _keep(seed, row, tile, branch, threshold, BLOCK: tl.constexpr):
    """Which of (BLOCK rows, 128 columns of a tile) are kept."""
    key = tl.load(seed)
    key0 = (key & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    lane = (tile * 16 + tl.arange(0, 16)).to(tl.uint32)
    c0 = tl.broadcast_to(lane[None, :], (BLOCK, 16))
    c1 = tl.broadcast_to(row.to(tl.uint32)[:, None], (BLOCK, 16))
    c2 = tl.zeros((BLOCK, 16), tl.uint32) + branch.to(tl.uint32)
    c3 = tl.zeros((BLOCK, 16), tl.uint32)
    for _ in tl.static_range(7):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    # Column 32 w + 16 t + lane: word w, half t. Joined dimensions come last, the outermost join lastly.
    word = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # (BLOCK, lane, w // 2, w % 2)
    bits = tl.join(word & 0xFFFF, word >> 16)  # (BLOCK, lane, w // 2, w % 2, t)
    bits = tl.reshape(tl.permute(bits, (0, 2, 3, 4, 1)), (BLOCK, 128))
    return bits >= threshold.to(tl.uint32)


@_jit
def project(x, a, h, seed, rows, columns, rank, x_stride, a_stride, h_stride, threshold, scale, branch,
            ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """h = drop(x) A^T for ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for tile in range(tl.cdiv(columns, TILE)):
        k = tile * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (k < columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + k[None, :], inside, 0.0)
        kept = tl.where(_keep(seed, row, tile, branch, threshold, ROWS), value.to(tl.float32) * scale, 0.0)
        down = tl.load(a + r[:, None] * a_stride + k[None, :], (r < rank)[:, None] & (k < columns)[None, :], 0.0)
        total = tl.dot(kept.to(value.dtype), tl.trans(down), total, input_precision=PRECISION)
    place = h + row[:, None] * h_stride + r[None, :]
    tl.store(place, total.to(h.dtype.element_ty), (row < rows)[:, None] & (r < rank)[None, :])


@_jit
def weigh(dh, x, partial, seed, rows, columns, rank, dh_stride, x_stride, threshold, scale, branch, blocks,
          ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One part of dA = dh^T drop(x): a tile of columns, over ``blocks`` blocks of rows."""
    tile, part = tl.program_id(0), tl.program_id(1)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    k = tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((RANK, TILE), tl.float32)
    for block in range(blocks):
        row = (part.to(tl.int64) * blocks + block) * ROWS + tl.arange(0, ROWS)
        inside = row < rows
        value = tl.load(x + row[:, None] * x_stride + k[None, :], inside[:, None] & (k < columns)[None, :], 0.0)
        kept = tl.where(_keep(seed, row, tile, branch, threshold, ROWS), value.to(tl.float32) * scale, 0.0)
        grad = tl.load(dh + row[:, None] * dh_stride + r[None, :], inside[:, None] & (r < rank)[None, :], 0.0)
        total = tl.dot(tl.trans(grad), kept.to(value.dtype), total, input_precision=PRECISION)
    place = partial + (part.to(tl.int64) * rank + r[:, None]) * columns + k[None, :]
    tl.store(place, total, (r < rank)[:, None] & (k < columns)[None, :])


@_jit
def spread(dh, a, dx, seed, rows, columns, rank, dh_stride, a_stride, dx_stride, threshold, scale, branch,
           ROWS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dx += drop'(dh A) for ROWS rows and a tile of columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    k = tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((ROWS, TILE), tl.float32)
    for begin in range(0, rank, RANK):
        r = begin + tl.arange(0, RANK)
        grad = tl.load(dh + row[:, None] * dh_stride + r[None, :], (row < rows)[:, None] & (r < rank)[None, :], 0.0)
        down = tl.load(a + r[:, None] * a_stride + k[None, :], (r < rank)[:, None] & (k < columns)[None, :], 0.0)
        total = tl.dot(grad, down, total, input_precision=PRECISION)
    kept = tl.where(_keep(seed, row, tile, branch, threshold, ROWS), total * scale, 0.0)
    place = dx + row[:, None] * dx_stride + k[None, :]
    inside = (row < rows)[:, None] & (k < columns)[None, :]
    tl.store(place, (tl.load(place, inside, 0.0).to(tl.float32) + kept).to(dx.dtype.element_ty), inside)


@_jit
def mask(out, seed, rows, columns, threshold, branch, ROWS: tl.constexpr):
    """out = 1 where an element is kept, else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = _keep(seed, row, tl.program_id(1), branch, threshold, ROWS)
    tl.store(out + row[:, None] * columns + k[None, :], keep, (row < rows)[:, None] & (k < columns)[None, :])


def _on(tensor: torch.Tensor) -> nullcontext | torch.cuda.device:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def shape(dtype: torch.dtype, rank: int) -> dict[str, object]:
    """Sizes of a program: rows, rank, warps. float32 has no tensor cores at full precision, and needs smaller ones."""
    wide = dtype == torch.float32
    block = min(32 if wide else 64, max(16, triton.next_power_of_2(rank)))
    return {
        "ROWS": 32 if wide else 64,
        "RANK": block,
        "PRECISION": "ieee" if wide else None,
        "num_warps": 8 if wide else 4,
    }


def _numbers(threshold: int, branch: int) -> tuple[int, float, int]:
    return threshold, 65536 / (65536 - threshold), branch


def run_project(x: torch.Tensor, a: torch.Tensor, h: torch.Tensor, seed: torch.Tensor, limit: int, branch: int) -> None:
    """h = drop(x) A^T, in place. x: (rows, columns), a: (rank, columns), h: (rows, rank), last strides 1."""
    (rows, columns), rank, sizes = x.shape, a.shape[0], shape(x.dtype, a.shape[0])
    if h.numel():
        with _on(x):
            project[triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(rank, sizes["RANK"])](
                x, a, h, seed, rows, columns, rank, x.stride(0), a.stride(0), h.stride(0), *_numbers(limit, branch),
                **sizes,
            )  # fmt: skip


def run_weigh(dh: torch.Tensor, x: torch.Tensor, da: torch.Tensor, seed: torch.Tensor, limit: int, branch: int) -> None:
    """da = dh^T drop(x), in place: in parts over the rows, then their sum."""
    (rows, columns), rank, sizes = x.shape, dh.shape[1], shape(x.dtype, dh.shape[1])
    blocks = max(1, triton.cdiv(triton.cdiv(rows, sizes["ROWS"]), SPLITS))
    parts = max(1, triton.cdiv(triton.cdiv(rows, sizes["ROWS"]), blocks))
    partial = torch.empty((parts, rank, columns), dtype=torch.float32, device=x.device)
    if da.numel():
        with _on(x):
            weigh[triton.cdiv(columns, TILE.value), parts, triton.cdiv(rank, sizes["RANK"])](
                dh, x, partial, seed, rows, columns, rank, dh.stride(0), x.stride(0), *_numbers(limit, branch), blocks,
                **sizes,
            )  # fmt: skip
        da.copy_(partial.sum(0))


def run_spread(
    dh: torch.Tensor, a: torch.Tensor, dx: torch.Tensor, seed: torch.Tensor, limit: int, branch: int
) -> None:
    """dx += drop'(dh A), in place."""
    (rows, columns), rank, sizes = dx.shape, a.shape[0], shape(dx.dtype, a.shape[0])
    if dx.numel():
        with _on(dx):
            spread[triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, TILE.value)](
                dh, a, dx, seed, rows, columns, rank, dh.stride(0), a.stride(0), dx.stride(0),
                *_numbers(limit, branch), **sizes,
            )  # fmt: skip


def run_mask(out: torch.Tensor, seed: torch.Tensor, limit: int, branch: int) -> None:
    """The mask as bool, in place. out: (rows, columns), contiguous."""
    rows, columns = out.shape
    if out.numel():
        with _on(out):
            mask[triton.cdiv(rows, 64), triton.cdiv(columns, TILE.value)](
                out, seed, rows, columns, limit, branch, ROWS=64, num_warps=4
            )
