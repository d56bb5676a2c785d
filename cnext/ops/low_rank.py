"""Low-rank products of the branches with fused dropout, each in one pass over its large matrix (x, y, dX or dY).

`project`, `grad_x` and `grad_a` apply dropout. C++ (float32, from `FEWEST_ROWS` rows on), CUDA (bfloat16 and float16)
and Triton fuse it into the product, and `grad_h_and_b` computes both of its products from one read of dY. Plain torch,
and C++ and CUDA for operands that their kernels do not take, drop blocks of at most `BLOCK_BYTES` and leave the
products to torch. No dropped matrix is stored. Without dropout a GPU's products are torch's, but for `expand` and
`grad_h_and_b`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch
from cnext.ops.branches_reference import threshold

BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**25}
"""Size of a dropped block: it stays in the last-level cache of a CPU, or in L2 of a GPU."""
TILE = branches_reference.TILE
MOST_RANK = 128
"""Largest rank of one launch of a C++ or CUDA kernel; a larger rank takes several."""
ONE_PASS = 32
"""Largest rank up to which `grad_h_and_b` reads dY once on a GPU: above it the partial sums of dh move more bytes."""
FEWEST_ROWS = 64
"""Rows of x from which the C++ kernels, which pack the small matrix first, are faster than torch."""
_LETTER = {torch.float32: "f", torch.bfloat16: "b", torch.float16: "h", torch.float64: "d"}


@dataclass
class Dropout:
    """Dropout of a call, and its implementation.

    independent: whether every branch has its own mask.
    impl: of kernels, or "torch".
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
        """The number of each mask, and its columns of h: all of them, or those of a branch in every layer."""
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


def grad_x(dh: Tensor, a: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """The branches' part of dX: drop'(dh A). dh: (rows, linears x rank); a: (linears x rank, in); dX: (rows, in)."""
    out = dh.new_empty(dh.shape[0], a.shape[1])
    fused, first = _fused(dropout, out, a), True
    if not fused and not dropout.probability:
        return product(dh, a, out)
    for branch, parts in dropout.masks(ranks, linears):
        for columns in parts:
            if fused:
                _launch("expand", dropout, branch, dh[:, columns], a[columns], out, first)
            for rows, block in () if fused else _row_blocks(out):
                product(dh[rows, columns], a[columns], block)
                _drop(block, out[rows], dropout, branch, first_row=rows.start, add=not first)
            first = False
    return out


def expand(h: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout: Dropout) -> Tensor:
    """The branches' part of y: scale * h B^T + bias. h: (rows, rank); b: B^T, (rank, out); y: (rows, out)."""
    rows, (rank, columns) = h.shape[0], b.shape
    out = h.new_empty(rows, columns)
    if not out.numel() or rank > MOST_RANK or not _fused(dropout, out, b, plain=True):
        return product(h, b, out, scale) if bias is None else torch.addmm(bias, h, b, alpha=scale, out=out)
    if dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        branches.run_expand(h, b, out, None, 0, 0, scale=scale, bias=bias)
        dropout.launched = True
        return out
    bias = None if bias is None else bias.contiguous()
    place = 0 if bias is None else bias.data_ptr()
    _call("expand", dropout, (h, b, out), (rows, columns, rank), place, False, scale, 0, 0, 0)
    return out


def grad_a(dh: Tensor, x: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """dA = dh^T drop(x). dh: (rows, linears x rank); x: (rows, in); dA: (linears x rank, in)."""
    da = x.new_empty(dh.shape[1], x.shape[1])
    fused = _fused(dropout, x, da)
    if not fused and not dropout.probability:
        return product(dh.T, x, da)
    for branch, parts in dropout.masks(ranks, linears):
        for columns in parts if fused else ():
            _launch("grad_a", dropout, branch, dh[:, columns], x, da[columns])
        # Blocks of columns, so that each sum over rows is within one product and rounded to the dtype once.
        for place, block in () if fused else _column_blocks(x):
            _drop(x[:, place], block, dropout, branch, first_column=place.start)
            for columns in parts:
                product(dh[:, columns].T, block, da[columns, place])
    return da


def grad_h_and_b(
    dy: Tensor, b: Tensor, h: Tensor | None, dh: Tensor | None, scale: float, dropout: Dropout
) -> Tensor | None:
    """dh = scale * dY B, written in place, and dB = scale * dY^T h, of one linear layer; either may be None.

    Args:
        dy: (rows, out). b: B^T, (rank, out). h: (rows, live rank). dh: (rows, rank).

    Returns:
        dB, (out, live rank).
    """
    db = None if h is None else dy.new_empty(dy.shape[1], h.shape[1])
    fits = b.shape[0] <= (MOST_RANK if dropout.impl == "cpp" else ONE_PASS)
    if h is not None and dh is not None and db is not None and fits and _fused(dropout, dy, b, plain=True):
        _launch_grad_b(dy, b, h, dh, db, scale, dropout)
        return db
    if dh is not None:
        product(dy, b.T, dh, scale)
    if h is not None and db is not None:
        product(dy.T, h, db, scale)
    return db


def _fused(dropout: Dropout, large: Tensor, beside: Tensor, plain: bool = False) -> bool:
    """Whether the implementation's kernels take these operands.

    CUDA's take 16-bit dtypes, for tensor cores, with rows that allow accesses of 16 bytes.

    plain: whether a GPU's kernels also run without dropout.
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
    """Blocks of x's columns, aligned to tiles of the mask, with a buffer of their size."""
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
    """out = drop(x), or out += drop(x), of a block at a row and a column of the mask."""
    seed, path, limit = dropout.seed, dropout.impl, threshold(dropout.probability)
    assert seed is not None, "dropout has a seed"
    rows, columns = x.shape
    if path == "torch":
        place = {"first_row": first_row, "first_column": first_column}
        keep = branches_reference.dropout_mask(seed, rows, columns, dropout.probability, branch, **place)
        term = torch.where(keep, x * (65536 / (65536 - limit)), 0.0)
        out.add_(term) if add else out.copy_(term)
        return
    if path != "cpp" and x.dtype == torch.float64:
        raise UserError(f"lora_branches: impl={path!r} does not support float64 with dropout; take impl='torch'")
    if not x.numel():
        return
    module: Any = dispatch.core(path)
    with dispatch.on(x.device):
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
    """Launches a product: "project" (x, A to h), "expand" (dh, A to dX) or "grad_a" (dh, x to dA).

    first: whether dX is overwritten; otherwise the product is added to it.
    """
    limit, seed = threshold(dropout.probability), dropout.seed
    if not out.numel() or not one.numel():
        if first:
            out.zero_()
        return
    if dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        assert seed is not None, "dropout has a seed"
        more = {"add": not first} if what == "expand" else {}
        getattr(branches, f"run_{what}")(one, two, out, seed, limit, branch, **more)
        dropout.launched = True
        return
    rank, columns = {"project": two, "expand": two, "grad_a": out}[what].shape
    for begin in range(0, rank, MOST_RANK):
        part = slice(begin, begin + MOST_RANK)
        mask = 0 if seed is None else seed.data_ptr(), limit, branch
        sizes = one.shape[0], columns, min(rank - begin, MOST_RANK)
        if what == "project":
            _call(what, dropout, (one, two[part], out[:, part]), sizes, *mask)
        elif what == "grad_a":
            _call(what, dropout, (one[:, part], two, out[part]), sizes, *mask)
        else:
            _call(what, dropout, (one[:, part], two[part], out), sizes, 0, begin > 0 or not first, 1.0, *mask)


def _call(what: str, dropout: Dropout, operands: Sequence[Tensor], sizes: Sequence[int], *numbers: float) -> None:
    """Calls a C++ or CUDA kernel: addresses of the operands, sizes, row strides, numbers, workspace, stream."""
    core: Any = dispatch.core(dropout.impl)
    on_gpu, like = dropout.impl == "cuda", operands[0]
    with dispatch.on(like.device):
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


def _launch_grad_b(dy: Tensor, b: Tensor, h: Tensor, dh: Tensor, db: Tensor, scale: float, dropout: Dropout) -> None:
    if not dy.numel():
        dh.zero_()
        db.zero_()
    elif dropout.impl == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        branches.run_grad_b(dy, b, h, dh, db, scale)
        dropout.launched = True
    else:
        _call("grad_b", dropout, (dy, b, h, dh, db), (*dy.shape, b.shape[0], h.shape[1]), scale)


def mask(seed: Tensor, rows: int, columns: int, probability: float, branch: int, impl: str) -> tuple[Tensor, str]:
    """Which elements of (rows, columns) are kept, and the implementation that computed it."""
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
