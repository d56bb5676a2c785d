"""The products of the branches' rank, each in one pass over its large matrix: x and dY are read, y and dX written.

`project`, `spread` and `weigh` see dropout. C++ (float32 of `FEWEST_ROWS` or more), CUDA (bfloat16 and float16) and
Triton drop on the way, and `gather` takes both of its products from one reading of dY. Plain torch, and C++ and CUDA
for what their kernels do not take, drop a block of at most `BLOCK_BYTES` at a time and leave the product to torch. No
dropped matrix is kept. Without dropout a GPU's products are torch's, but for `write` and `gather`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch
from cnext.ops.branches_reference import threshold

BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**25}
"""A dropped block stays in a cache: of a CPU the last, of a GPU the second."""
TILE = branches_reference.TILE
MOST_RANK = 128
"""What one launch of a C++ or CUDA kernel takes; a larger rank takes several."""
ONE_PASS = 32
"""Up to what rank `gather` reads dY once on a GPU: above, the float32 parts of dh move more than reading it again."""
FEWEST_ROWS = 64
"""Of x, from which on the C++ kernels are faster than torch: they pack the small matrix first."""
_LETTER = {torch.float32: "f", torch.bfloat16: "b", torch.float16: "h", torch.float64: "d"}


@dataclass
class Dropout:
    """Seed, probability, whether every branch has a mask of its own, and the implementation: of kernels, or "torch".

    launched: whether a kernel of the implementation has been launched.
    """

    seed: Tensor | None
    probability: float
    independent: bool
    impl: str
    launched: bool = False

    @property
    def ran(self) -> str:
        """For `dispatch.last_path`."""
        return self.impl if self.launched else "torch"

    def masks(self, ranks: Sequence[int], linears: int) -> Iterator[tuple[int, list[slice]]]:
        """Each mask's number, and the columns of h that it belongs to: all of them, or a branch's in every layer."""
        rank = sum(ranks)
        if not self.independent or not self.probability:
            yield 0, [slice(0, linears * rank)]
            return
        for branch, (end, width) in enumerate(zip(accumulate(ranks), ranks, strict=True)):
            yield branch, [slice(g * rank + end - width, g * rank + end) for g in range(linears)]


def product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """out = scale * a b, by torch."""
    return torch.mm(a, b, out=out) if scale == 1.0 else torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def project(x: Tensor, a: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """h = drop(x) A^T. x: (rows, in); a: (linears x rank, in); h: (rows, linears x rank)."""
    h = x.new_empty(x.shape[0], a.shape[0])
    fused = _fused(dropout, x, a)
    if not fused and not dropout.probability:
        return product(x, a.T, h)
    for branch, parts in dropout.masks(ranks, linears):
        for columns in parts if fused else ():
            _launch("project", dropout, branch, x, a[columns], h[:, columns])
        for rows, block in () if fused else _row_blocks(x):
            _drop(x[rows], block, dropout, branch, first_row=rows.start)
            for columns in parts:
                product(block, a[columns].T, h[rows, columns])
    return h


def spread(dh: Tensor, a: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """The branches' part of dX: drop'(dh A), (rows, in)."""
    out = dh.new_empty(dh.shape[0], a.shape[1])
    fused, first = _fused(dropout, out, a), True
    if not fused and not dropout.probability:
        return product(dh, a, out)
    for branch, parts in dropout.masks(ranks, linears):
        for columns in parts:
            if fused:
                _launch("spread", dropout, branch, dh[:, columns], a[columns], out, first)
            for rows, block in () if fused else _row_blocks(out):
                product(dh[rows, columns], a[columns], block)
                _drop(block, out[rows], dropout, branch, first_row=rows.start, add=not first)
            first = False
    return out


def write(h: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout: Dropout) -> Tensor:
    """The branches' part of y: scale * h B^T + bias, (rows, out).

    h: (rows, rank). b: (rank, out), B transposed.
    """
    rows, (rank, columns) = h.shape[0], b.shape
    out = h.new_empty(rows, columns)
    if not out.numel() or rank > MOST_RANK or not _fused(dropout, out, b, plain=True):
        return product(h, b, out, scale) if bias is None else torch.addmm(bias, h, b, alpha=scale, out=out)
    if dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        branches.run_spread(h, b, out, None, 0, 0, scale=scale, bias=bias)
        dropout.launched = True
        return out
    bias = None if bias is None else bias.contiguous()
    place = 0 if bias is None else bias.data_ptr()
    _call("spread", dropout, (h, b, out), (rows, columns, rank), place, False, scale, 0, 0, 0)
    return out


def weigh(dh: Tensor, x: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """dA = dh^T drop(x), (linears x rank, in)."""
    da = x.new_empty(dh.shape[1], x.shape[1])
    fused = _fused(dropout, x, da)
    if not fused and not dropout.probability:
        return product(dh.T, x, da)
    for branch, parts in dropout.masks(ranks, linears):
        for columns in parts if fused else ():
            _launch("weigh", dropout, branch, dh[:, columns], x, da[columns])
        # Blocks of columns: a sum over the rows of one product is rounded once, in the operands' dtype.
        for place, block in () if fused else _column_blocks(x):
            _drop(x[:, place], block, dropout, branch, first_column=place.start)
            for columns in parts:
                product(dh[:, columns].T, block, da[columns, place])
    return da


def gather(dy: Tensor, b: Tensor, h: Tensor | None, dh: Tensor | None, scale: float, dropout: Dropout) -> Tensor | None:
    """dh = scale * dY B, in place, and dB = scale * dY^T h, of one linear layer; either may be None.

    Args:
        dy: (rows, out). b: (rank, out), B transposed. h: (rows, live rank). dh: (rows, rank).

    Returns:
        dB, (out, live rank).
    """
    db = None if h is None else dy.new_empty(dy.shape[1], h.shape[1])
    fits = b.shape[0] <= (MOST_RANK if dropout.impl == "cpp" else ONE_PASS)
    if h is not None and dh is not None and db is not None and fits and _fused(dropout, dy, b, plain=True):
        _launch_gather(dy, b, h, dh, db, scale, dropout)
        return db
    if dh is not None:
        product(dy, b.T, dh, scale)
    if h is not None and db is not None:
        product(dy.T, h, db, scale)
    return db


def _fused(dropout: Dropout, large: Tensor, beside: Tensor, plain: bool = False) -> bool:
    """Whether kernels take these: in CUDA what is moved 16 bytes at a time, save float32, for want of tensor cores.

    plain: whether those of a GPU take them without dropout too.
    """
    impl = dropout.impl
    if impl == "cpp":
        core: Any = dispatch.core(impl)
        suits = large.dtype == torch.float32 and large.shape[0] >= FEWEST_ROWS
        return suits and large.stride(1) == beside.stride(1) == 1 and core.has_low_rank()
    if not plain and not dropout.probability:
        return False
    if impl == "triton":
        return large.dtype != torch.float64
    return (
        impl == "cuda"
        and large.dtype in (torch.bfloat16, torch.float16)
        and all(m.shape[1] % 8 == 0 and m.stride(0) % 8 == 0 and m.data_ptr() % 16 == 0 for m in (large, beside))
    )


def _row_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of x's rows, with a buffer of their size."""
    rows, columns = x.shape
    height = max(32, BLOCK_BYTES.get(x.device.type, 2**22) // max(1, columns * x.element_size()))
    buffer = x.new_empty(min(rows, height), columns)
    for begin in range(0, rows, height):
        block = slice(begin, min(begin + height, rows))
        yield block, buffer[: block.stop - begin]


def _column_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of x's columns, with a buffer of their size; they begin where a tile of the mask does."""
    rows, columns = x.shape
    width = max(1, BLOCK_BYTES.get(x.device.type, 2**22) // max(1, rows * x.element_size()) // TILE) * TILE
    buffer = x.new_empty(rows * min(columns, width))
    for begin in range(0, columns, width):
        block = slice(begin, min(begin + width, columns))
        size = block.stop - begin
        yield block, buffer[: rows * size].view(rows, size)


def _drop(
    x: Tensor,
    out: Tensor,
    dropout: Dropout,
    branch: int,
    *,
    first_row: int = 0,
    first_column: int = 0,
    add: bool = False,
) -> None:
    """out = drop(x), or out += drop(x), of a block whose mask begins at a row and a column."""
    seed, path, limit = dropout.seed, dropout.impl, threshold(dropout.probability)
    assert seed is not None, "there is dropout"
    rows, columns = x.shape
    if path == "torch":
        place = {"first_row": first_row, "first_column": first_column}
        keep = branches_reference.dropout_mask(seed, rows, columns, dropout.probability, branch, **place)
        term = torch.where(keep, x * (65536 / (65536 - limit)), 0.0)
        out.add_(term) if add else out.copy_(term)
        return
    if path != "cpp" and x.dtype == torch.float64:
        raise UserError(f"lora_branches: impl={path!r} has no float64 with dropout; take impl='torch'")
    if not x.numel():
        return
    module: Any = dispatch.core(path)
    with torch.cuda.device(x.device) if path == "cuda" else nullcontext():
        module.dropout(
            _LETTER[x.dtype],
            add,
            x.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            x.stride(0),
            out.stride(0),
            first_row,
            first_column,
            seed.data_ptr(),
            limit,
            branch,
            torch.get_num_threads() if path == "cpp" else torch.cuda.current_stream().cuda_stream,
        )
    dropout.launched = True


def _launch(
    what: str,
    dropout: Dropout,
    branch: int,
    one: Tensor,
    two: Tensor,
    out: Tensor,
    first: bool = True,
) -> None:
    """A pass by a kernel: "project" (x, A to h), "spread" (dh, A to dX) or "weigh" (dh, x to dA).

    first: whether dX is written; it is added to where it is not.
    """
    limit, seed = threshold(dropout.probability), dropout.seed
    if not out.numel() or not one.numel():
        if first:
            out.zero_()
        return
    if dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        assert seed is not None, "there is dropout"
        more = {"add": not first} if what == "spread" else {}
        getattr(branches, f"run_{what}")(one, two, out, seed, limit, branch, **more)
        dropout.launched = True
        return
    rank, columns = {"project": two, "spread": two, "weigh": out}[what].shape
    for begin in range(0, rank, MOST_RANK):
        part = slice(begin, begin + MOST_RANK)
        mask = 0 if seed is None else seed.data_ptr(), limit, branch
        sizes = one.shape[0], columns, min(rank - begin, MOST_RANK)
        if what == "project":
            _call(what, dropout, (one, two[part], out[:, part]), sizes, *mask)
        elif what == "weigh":
            _call(what, dropout, (one[:, part], two, out[part]), sizes, *mask)
        else:
            _call(what, dropout, (one[:, part], two[part], out), sizes, 0, begin > 0 or not first, 1.0, *mask)


def _call(what: str, dropout: Dropout, operands: Sequence[Tensor], sizes: Sequence[int], *numbers: float) -> None:
    """A kernel of the C++ or CUDA layer by its addresses: operands, sizes, row strides, numbers, workspace, stream."""
    core: Any = dispatch.core(dropout.impl)
    on_gpu, like = dropout.impl == "cuda", operands[0]
    with torch.cuda.device(like.device) if on_gpu else nullcontext():
        bytes_needed = core.workspace(what, *sizes[:3], sizes[3] if len(sizes) > 3 else 0)
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=like.device)
        getattr(core, what)(
            _LETTER[like.dtype],
            *(t.data_ptr() for t in operands),
            *sizes,
            *(t.stride(0) for t in operands),
            *numbers,
            workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream if on_gpu else torch.get_num_threads(),
        )
    dropout.launched = True


def _launch_gather(dy: Tensor, b: Tensor, h: Tensor, dh: Tensor, db: Tensor, scale: float, dropout: Dropout) -> None:
    if not dy.numel():
        dh.zero_()
        db.zero_()
    elif dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        branches.run_gather(dy, b, h, dh, db, scale)
        dropout.launched = True
    else:
        _call("gather", dropout, (dy, b, h, dh, db), (*dy.shape, b.shape[0], h.shape[1]), scale)


def mask(seed: Tensor, rows: int, columns: int, probability: float, branch: int, impl: str) -> tuple[Tensor, str]:
    """Which elements of (rows, columns) are kept, and what computed it."""
    if impl == "reference":
        return branches_reference.dropout_mask(seed, rows, columns, probability, branch), impl
    dropout = Dropout(seed, probability, False, impl)
    if impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        keep = seed.new_empty((rows, columns), dtype=torch.bool)
        branches.run_mask(keep, seed, threshold(probability), branch)
        dropout.launched = bool(keep.numel())
    else:
        ones = torch.ones(rows, columns, device=seed.device)
        dropped = torch.empty_like(ones)
        _drop(ones, dropped, dropout, branch)
        keep = dropped != 0
    return keep, dropout.ran
