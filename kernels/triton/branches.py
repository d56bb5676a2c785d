"""Triton kernels of the low-rank products, with the dropout mask computed from its seed on the fly.

The mask is that of `cnext.ops.branches_reference.dropout_mask`. Sums are float32 and in a fixed order, without atomics:
where a sum is split over programs, each writes its part, and `combine` adds them.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch

import triton
import triton.language as tl

TILE = tl.constexpr(128)
_jit = triton.jit(do_not_specialize=["rows", "threshold", "branch", "count"])


@triton.jit
def _multiply(word, factor: tl.constexpr):
    """High and low word of a product, by one 64-bit multiplication."""
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _words(seed, row, lane, branch, zero):
    """Philox 4x32-7 at (lane, row, branch, 0), where ``lane`` is (1, lanes) and ``row`` (rows, 1).

    The first two rounds depend on a row or on a lane alone: only from the third on there is work for each pair.
    ``zero`` is 0 in their common shape: the words take over its layout.
    """
    key = tl.load(seed)
    key0, key1 = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2 = lane.to(tl.uint32), row.to(tl.uint32), branch.to(tl.uint32)
    c3 = c2 * 0
    for i in tl.static_range(7):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ key0 ^ c1, low1, high0 ^ key1 ^ c3, low0
        if i == 1:
            c2 ^= zero
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _keep(seed, row, tile, branch, threshold, BLOCK: tl.constexpr):
    """Which of (BLOCK rows, 128 columns of a tile) are kept."""
    lane = tile * 16 + tl.arange(0, 16)
    c0, c1, c2, c3 = _words(seed, row[:, None], lane[None, :], branch, tl.zeros((BLOCK, 16), tl.uint32))
    # Column 32 w + 16 t + lane: word w, half t. Joined dimensions come last, the outermost join lastly.
    word = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # (BLOCK, lane, w // 2, w % 2)
    bits = tl.join(word << 16, word)  # (BLOCK, lane, w // 2, w % 2, t)
    bits = tl.reshape(tl.permute(bits, (0, 2, 3, 4, 1)), (BLOCK, 128))
    return bits >= threshold.to(tl.uint32) << 16  # of the upper half alone: the lower half does not change it


@triton.jit
def _joined(x0, x1, x2, x3, x4, x5, x6, x7, seed, row, tile, branch, threshold, BLOCK: tl.constexpr):
    """(BLOCK, 128) from eight parts, part 2 w + t of word w and half t; 0 where an element is dropped."""
    if x0.dtype.primitive_bitwidth == 32:
        zero = (x0.to(tl.uint32, bitcast=True) >> 16) >> 16
    else:
        zero = ((x0.to(tl.uint16, bitcast=True) >> 8) >> 8).to(tl.uint32)
    lane = tile * 16 + tl.arange(0, 16)
    c0, c1, c2, c3 = _words(seed, row[:, None], lane[None, :], branch, zero)
    limit = threshold.to(tl.uint32) << 16
    x0 = tl.where(c0 << 16 >= limit, x0, 0.0)
    x1 = tl.where(c0 >= limit, x1, 0.0)
    x2 = tl.where(c1 << 16 >= limit, x2, 0.0)
    x3 = tl.where(c1 >= limit, x3, 0.0)
    x4 = tl.where(c2 << 16 >= limit, x4, 0.0)
    x5 = tl.where(c2 >= limit, x5, 0.0)
    x6 = tl.where(c3 << 16 >= limit, x6, 0.0)
    x7 = tl.where(c3 >= limit, x7, 0.0)
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))  # (BLOCK, lane, w // 2, w % 2)
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1)), (BLOCK, 128))


@triton.jit
def _dropped(value, seed, row, tile, branch, threshold, BLOCK: tl.constexpr):
    """value (BLOCK, 128); 0 where it is dropped."""
    parts = tl.permute(tl.reshape(value, (BLOCK, 2, 2, 2, 16)), (0, 4, 1, 2, 3))  # (BLOCK, lane, w // 2, w % 2, t)
    even, odd = tl.split(parts)
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    x0, x4 = tl.split(even0)
    x2, x6 = tl.split(even1)
    x1, x5 = tl.split(odd0)
    x3, x7 = tl.split(odd1)
    return _joined(x0, x1, x2, x3, x4, x5, x6, x7, seed, row, tile, branch, threshold, BLOCK)


@triton.jit
def _part(x, row, rows, columns, stride, begin, WIDTH: tl.constexpr, FULL: tl.constexpr):
    k = begin + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None]
    if not FULL:
        inside &= (k < columns)[None, :]
    return tl.load(x + row[:, None] * stride + k[None, :], inside, 0.0)


@triton.jit
def _kept(x, row, rows, columns, stride, tile, seed, branch, threshold, BLOCK: tl.constexpr, MASK: tl.constexpr,
          FULL: tl.constexpr):  # fmt: skip
    """x at (BLOCK rows, 128 columns of a tile); 0 where it is dropped.

    With a mask, in eight loads of the 16 columns of one half of one word: a thread's elements then have the layout of
    its words, and no random bits are exchanged through shared memory.
    """
    begin = tile * TILE
    if MASK:
        x0 = _part(x, row, rows, columns, stride, begin, 16, FULL)
        x1 = _part(x, row, rows, columns, stride, begin + 16, 16, FULL)
        x2 = _part(x, row, rows, columns, stride, begin + 32, 16, FULL)
        x3 = _part(x, row, rows, columns, stride, begin + 48, 16, FULL)
        x4 = _part(x, row, rows, columns, stride, begin + 64, 16, FULL)
        x5 = _part(x, row, rows, columns, stride, begin + 80, 16, FULL)
        x6 = _part(x, row, rows, columns, stride, begin + 96, 16, FULL)
        x7 = _part(x, row, rows, columns, stride, begin + 112, 16, FULL)
        value = _joined(x0, x1, x2, x3, x4, x5, x6, x7, seed, row, tile, branch, threshold, BLOCK)
    else:
        value = _part(x, row, rows, columns, stride, begin, 128, FULL)
    return value


@_jit
def project(x, a, out, seed, rows, columns, x_stride, a_stride, out_stride, part_stride, threshold, scale, branch,
            count, rank: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One part of h = scale (keep o x) A^T: ROWS rows, over ``count`` tiles of columns."""
    # Programs of the same rows are adjacent: they share x in L2.
    ranks: tl.constexpr = (rank + RANK - 1) // RANK
    r = tl.program_id(0) % ranks * RANK + tl.arange(0, RANK)
    row = (tl.program_id(0) // ranks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    total = tl.zeros((RANK, ROWS), tl.float32)  # A x^T: the tensor cores read the masked operand from shared memory
    for tile in range(part * count, min((part + 1) * count, tl.cdiv(columns, TILE))):
        value = _kept(x, row, rows, columns, x_stride, tile, seed, branch, threshold, ROWS, MASK, FULL)
        k = tile * TILE + tl.arange(0, TILE)
        down = tl.load(a + r[:, None] * a_stride + k[None, :], (r < rank)[:, None] & (k < columns)[None, :], 0.0)
        total = tl.dot(down, tl.trans(value), total, input_precision=PRECISION)
    place = out + part.to(tl.int64) * part_stride + row[:, None] * out_stride + r[None, :]
    result = (tl.trans(total) * scale).to(out.dtype.element_ty)
    tl.store(place, result, (row < rows)[:, None] & (r < rank)[None, :])


@_jit
def grad_a(dh, x, out, seed, rows, columns, x_stride, out_stride, part_stride, threshold, scale, branch, count,
          rank: tl.constexpr, dh_stride: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, MASK: tl.constexpr,
          FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One part of dA = scale dh^T (keep o x): a tile of columns, over ``count`` blocks of rows."""
    r = tl.program_id(0) * RANK + tl.arange(0, RANK)
    tile, part = tl.program_id(1), tl.program_id(2)
    k = tile * TILE + tl.arange(0, TILE)
    total = tl.zeros((RANK, TILE), tl.float32)
    for block in range(part * count, min((part + 1) * count, tl.cdiv(rows, ROWS))):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        value = _kept(x, row, rows, columns, x_stride, tile, seed, branch, threshold, ROWS, MASK, FULL)
        grad = tl.load(dh + row[:, None] * dh_stride + r[None, :], (row < rows)[:, None] & (r < rank)[None, :], 0.0)
        total = tl.dot(tl.trans(grad), value, total, input_precision=PRECISION)
    place = out + part.to(tl.int64) * part_stride + r[:, None].to(tl.int64) * out_stride + k[None, :]
    tl.store(place, (total * scale).to(out.dtype.element_ty), (r < rank)[:, None] & (k < columns)[None, :])


@_jit
def expand(dh, a, out, bias, seed, rows, columns, a_stride, out_stride, threshold, scale, branch,
           rank: tl.constexpr, dh_stride: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr,
           MASK: tl.constexpr, FULL: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """out = [out +] keep o (scale dh A) [+ bias] for ROWS rows and a tile of columns."""
    tiles = tl.cdiv(columns, TILE)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tile * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None]
    if not FULL:
        inside &= (k < columns)[None, :]
    total = tl.zeros((ROWS, TILE), tl.float32)
    for step in range(STEPS):
        r = step * RANK + tl.arange(0, RANK)
        grad = tl.load(dh + row[:, None] * dh_stride + r[None, :], (row < rows)[:, None] & (r < rank)[None, :], 0.0)
        down = tl.load(a + r[:, None] * a_stride + k[None, :], (r < rank)[:, None] & (k < columns)[None, :], 0.0)
        total = tl.dot(grad, down, total, input_precision=PRECISION)
    total *= scale
    if MASK:
        total = _dropped(total, seed, row, tile, branch, threshold, ROWS)
    if BIAS:
        total += tl.load(bias + k, k < columns, 0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * out_stride + k[None, :]
    if ADD:
        total += tl.load(place, inside, 0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), inside)


@_jit
def grad_b(dy, bt, h, dh, db, rows, columns, dy_stride, bt_stride, dh_part, db_part, count,
           rank: tl.constexpr, live: tl.constexpr, h_stride: tl.constexpr, ROWS: tl.constexpr, SLAB: tl.constexpr,
           RANK: tl.constexpr, LIVE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A slab of columns, over ``count`` blocks of rows: its part of dY B, and one part of its dY^T h."""
    slab, part = tl.program_id(0), tl.program_id(1)
    k = slab * SLAB + tl.arange(0, SLAB)
    r, j = tl.arange(0, RANK), tl.arange(0, LIVE)
    up = tl.load(bt + r[:, None] * bt_stride + k[None, :], (r < rank)[:, None] & (k < columns)[None, :], 0.0)
    total = tl.zeros((SLAB, LIVE), tl.float32)
    for block in range(part * count, min((part + 1) * count, tl.cdiv(rows, ROWS))):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None]
        grad = tl.load(dy + row[:, None] * dy_stride + k[None, :], inside & (k < columns)[None, :], 0.0)
        mine = tl.load(h + row[:, None] * h_stride + j[None, :], inside & (j < live)[None, :], 0.0)
        total = tl.dot(tl.trans(grad), mine, total, input_precision=PRECISION)
        back = tl.dot(grad, tl.trans(up), input_precision=PRECISION)
        tl.store(
            dh + slab.to(tl.int64) * dh_part + row[:, None] * rank + r[None, :], back, inside & (r < rank)[None, :]
        )
    place = db + part.to(tl.int64) * db_part + k[:, None].to(tl.int64) * live + j[None, :]
    tl.store(place, total, (k < columns)[:, None] & (j < live)[None, :])


@_jit
def combine(partial, out, rows, columns, out_stride, scale, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = scale times the sum of ``count`` parts, in their order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (k < columns)[None, :]
    place = partial + row[:, None] * columns + k[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(count):
        total += tl.load(place, inside, 0.0)
        place += rows.to(tl.int64) * columns
    tl.store(out + row[:, None] * out_stride + k[None, :], (total * scale).to(out.dtype.element_ty), inside)


@_jit
def mask(out, seed, rows, columns, threshold, branch, ROWS: tl.constexpr):
    """out = 1 where an element is kept, else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keep = _keep(seed, row, tl.program_id(1), branch, threshold, ROWS)
    tl.store(out + row[:, None] * columns + k[None, :], keep, (row < rows)[:, None] & (k < columns)[None, :])


def sizes(what: str, dtype: torch.dtype, rank: int, room: int) -> dict[str, object]:
    """A program's rows, rank and columns, and the compiler's options; "add" is expand that accumulates.

    In 16 bits a program computes up to 128 of the rank, padded to the tensor cores' minimum of 64 where it is the
    longer side. Registers are limited where more programs then fit on a multiprocessor without spills. float32 has no
    tensor cores at full precision: small programs, many at once.

    Args:
        room: bytes of shared memory per program; blocks are smaller where there is less than on sm_90.
    """
    power, large = max(16, triton.next_power_of_2(rank)), room > 200_000
    if dtype == torch.float32:
        warps = 8 if what in ("project", "grad_a") else 4
        options = {"ROWS": 32, "RANK": min(32, power), "PRECISION": "ieee", "num_warps": warps, "num_stages": 1}
        return options | ({"SLAB": 128} if what == "grad_b" else {})
    options = {"PRECISION": None, "num_warps": 8, "num_stages": 2} | ({"maxnreg": 128} if large else {})
    if what in ("expand", "add"):
        bound = {"maxnreg": 128} if large and what == "expand" and rank <= 96 else {}
        return {"ROWS": 64, "RANK": min(128, power), "PRECISION": None, "num_warps": 4, "num_stages": 2} | bound
    if what == "grad_b":
        slab = (512 if power < 64 else 256) if large else 128
        return {"ROWS": 64, "RANK": min(64, power), "SLAB": slab} | options
    if rank <= 64:
        return {"ROWS": 128 if what == "project" and large else 64, "RANK": 64} | options
    if what == "project" or not large:
        return {"ROWS": 64, "RANK": 128} | options
    return {"ROWS": 128, "RANK": 128} | options | {"num_warps": 16}


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory per program; without a GPU, values for the interpreter."""
    if index is None:
        return 4, 232_448
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    return found["multiprocessor_count"], found["max_shared_mem"]


def _on(tensor: torch.Tensor) -> nullcontext | torch.cuda.device:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _split(blocks: int, programs: int, wanted: int) -> tuple[int, int]:
    """The parts to split a sum over blocks into, so that ``programs`` become up to ``wanted``; the blocks of a part."""
    count = triton.cdiv(max(1, blocks), min(max(1, wanted // programs), max(1, blocks)))
    return max(1, triton.cdiv(blocks, count)), count


def _combine(partial: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """out = scale times the sum of partial (parts, rows, columns)."""
    parts, rows, columns = partial.shape
    if out.numel():
        wide = min(128, triton.next_power_of_2(columns))
        combine[triton.cdiv(rows, 1024 // wide), triton.cdiv(columns, wide)](
            partial, out, rows, columns, out.stride(0), scale, parts, ROWS=1024 // wide, COLUMNS=wide, num_warps=4
        )


def run_project(
    x: torch.Tensor, a: torch.Tensor, h: torch.Tensor, seed: torch.Tensor | None, limit: int, branch: int
) -> None:
    """h = drop(x) A^T, written in place. x: (rows, columns), a: (rank, columns), h: (rows, rank), last strides 1."""
    (rows, columns), rank, (processors, room) = x.shape, a.shape[0], _device(x.device.index)
    options = sizes("project", x.dtype, rank, room)
    programs = triton.cdiv(rank, options["RANK"]) * triton.cdiv(rows, options["ROWS"])
    if h.numel():
        parts, count = _split(triton.cdiv(columns, TILE.value), programs, 2 * processors)
        with _on(x):
            out = h if parts == 1 else x.new_empty((parts, rows, rank), dtype=torch.float32)
            project[programs, parts](
                x, a, out, seed, rows, columns, x.stride(0), a.stride(0), out.stride(-2), rows * rank,
                limit, 65536 / (65536 - limit), branch, count,
                rank=rank, MASK=seed is not None, FULL=columns % TILE.value == 0, **options,
            )  # fmt: skip
            if parts > 1:
                _combine(out, h)


def run_grad_a(
    dh: torch.Tensor, x: torch.Tensor, da: torch.Tensor, seed: torch.Tensor | None, limit: int, branch: int
) -> None:
    """da = dh^T drop(x), in place. dh: (rows, rank), x: (rows, columns), da: (rank, columns), last strides 1."""
    (rows, columns), rank, (processors, room) = x.shape, dh.shape[1], _device(x.device.index)
    options = sizes("grad_a", x.dtype, rank, room)
    ranks, tiles = triton.cdiv(rank, options["RANK"]), triton.cdiv(columns, TILE.value)
    if da.numel():
        blocks = triton.cdiv(rows, options["ROWS"])
        parts, count = _split(blocks, ranks * tiles, (2 if rank <= 64 else 1) * processors)
        with _on(x):
            out = da if parts == 1 else x.new_empty((parts, rank, columns), dtype=torch.float32)
            grad_a[ranks, tiles, parts](
                dh, x, out, seed, rows, columns, x.stride(0), out.stride(-2), rank * columns,
                limit, 65536 / (65536 - limit), branch, count,
                rank=rank, dh_stride=dh.stride(0), MASK=seed is not None, FULL=columns % TILE.value == 0, **options,
            )  # fmt: skip
            if parts > 1:
                _combine(out, da)


def run_expand(
    dh: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
    seed: torch.Tensor | None,
    limit: int,
    branch: int,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    add: bool = False,
) -> None:
    """out = drop'(scale dh A) + bias, written in place; with ``add`` it is added to out. No seed: no dropout.

    dh: (rows, rank), a: (rank, columns), out: (rows, columns), bias: (columns,), last strides 1.
    """
    (rows, columns), rank = out.shape, a.shape[0]
    options = sizes("add" if add else "expand", out.dtype, rank, _device(out.device.index)[1])
    if out.numel():
        with _on(out):
            expand[triton.cdiv(columns, TILE.value) * triton.cdiv(rows, options["ROWS"]),](
                dh, a, out, bias, seed, rows, columns, a.stride(0), out.stride(0),
                limit, scale * 65536 / (65536 - limit), branch,
                rank=rank, dh_stride=dh.stride(0), STEPS=triton.cdiv(rank, options["RANK"]),
                MASK=seed is not None, FULL=columns % TILE.value == 0, ADD=add, BIAS=bias is not None, **options,
            )  # fmt: skip


def run_grad_b(
    dy: torch.Tensor, bt: torch.Tensor, h: torch.Tensor, dh: torch.Tensor, db: torch.Tensor, scale: float
) -> None:
    """dh = scale dY B and db = scale dY^T h, written in place; one pass over dY per 64 of rank (float32: 32).

    dy: (rows, columns), bt: (rank, columns), h: (rows, live), dh: (rows, rank), db: (columns, live), last strides 1.
    """
    step = sizes("grad_b", dy.dtype, 64, 0)["RANK"]
    with _on(dy):
        for begin in range(0, max(bt.shape[0], h.shape[1]), step):
            end = begin + step
            _grad_b(dy, bt[begin:end], h[:, begin:end], dh[:, begin:end], db[:, begin:end], scale)


def _grad_b(
    dy: torch.Tensor, bt: torch.Tensor, h: torch.Tensor, dh: torch.Tensor, db: torch.Tensor, scale: float
) -> None:
    (rows, columns), rank, live, (processors, room) = dy.shape, bt.shape[0], h.shape[1], _device(dy.device.index)
    options = sizes("grad_b", dy.dtype, max(rank, live), room)
    options["LIVE"] = options["RANK"]
    slabs = max(1, triton.cdiv(columns, options["SLAB"]))
    parts, count = _split(triton.cdiv(rows, options["ROWS"]), slabs, processors)
    back = dy.new_empty((slabs, rows, rank), dtype=torch.float32)
    partial = dy.new_empty((parts, columns, live), dtype=torch.float32)
    grad_b[slabs, parts](
        dy, bt, h, back, partial, rows, columns, dy.stride(0), bt.stride(0), rows * rank, columns * live, count,
        rank=rank, live=live, h_stride=h.stride(0), **options,
    )  # fmt: skip
    _combine(back, dh, scale)
    _combine(partial, db, scale)


def run_mask(out: torch.Tensor, seed: torch.Tensor, limit: int, branch: int) -> None:
    """The mask as bool, written in place. out: (rows, columns), contiguous."""
    rows, columns = out.shape
    if out.numel():
        with _on(out):
            mask[triton.cdiv(rows, 64), triton.cdiv(columns, TILE.value)](
                out, seed, rows, columns, limit, branch, ROWS=64, num_warps=4
            )
