"""The passes over x and dX that see dropout. Triton fuses it in; C++ and CUDA leave the product to the GEMM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch
from cnext.ops.branches_reference import threshold

Random = tuple[Tensor | None, float, bool, str]
"""Seed, probability, whether every branch has a mask of its own, and the implementation."""
_LETTER = {torch.float32: "f", torch.bfloat16: "b", torch.float16: "h", torch.float64: "d"}


def _passes(ranks: Sequence[int], linears: int, random: Random) -> Iterator[tuple[int, list[slice]]]:
    """One mask's number, and the columns of h that it belongs to in every linear layer."""
    rank = sum(ranks)
    if not random[2]:
        yield 0, [slice(0, linears * rank)]
        return
    for branch, (end, width) in enumerate(zip(accumulate(ranks), ranks, strict=True)):
        yield branch, [slice(g * rank + end - width, g * rank + end) for g in range(linears)]


def projected(x: Tensor, a: Tensor, ranks: Sequence[int], linears: int, random: Random) -> Tensor:
    """h = drop(x) A^T."""
    if not random[1]:
        return F.linear(x, a)
    h = x.new_empty(x.shape[0], a.shape[0])
    for branch, parts in _passes(ranks, linears, random):
        dropped = None if random[3] == "triton" else _dropped(x, random, branch)
        for columns in parts:
            if dropped is None:
                _triton("project", x, a[columns], h[:, columns], random, branch)
            else:
                torch.mm(dropped, a[columns].T, out=h[:, columns])
    return h


def spread(dx: Tensor, dh: Tensor, a: Tensor, ranks: Sequence[int], linears: int, random: Random) -> None:
    """dx += drop'(dh A), in place."""
    if not random[1]:
        dx.addmm_(dh, a)
        return
    for branch, parts in _passes(ranks, linears, random):
        for columns in parts:
            if random[3] == "triton":
                _triton("spread", dh[:, columns], a[columns], dx, random, branch)
            else:
                _launch("dropout_add", dh[:, columns] @ a[columns], dx, random, branch)


def weighed(dh: Tensor, x: Tensor, ranks: Sequence[int], linears: int, random: Random) -> Tensor:
    """dA = dh^T drop(x)."""
    if not random[1]:
        return dh.T @ x
    da = x.new_empty(dh.shape[1], x.shape[1])
    for branch, parts in _passes(ranks, linears, random):
        dropped = None if random[3] == "triton" else _dropped(x, random, branch)
        for columns in parts:
            if dropped is None:
                _triton("weigh", dh[:, columns], x, da[columns], random, branch)
            else:
                torch.mm(dh[:, columns].T, dropped, out=da[columns])
    return da


def _dropped(x: Tensor, random: Random, branch: int) -> Tensor:
    """keep o x / (1 - p), a copy."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch("dropout", x, out, random, branch)
    return out


def _launch(what: str, x: Tensor, out: Tensor, random: Random, branch: int) -> None:
    """out = drop(x) ("dropout") or out += drop(x) ("dropout_add"); x: (rows, columns), its columns side by side."""
    seed, dropout, _, path = random
    assert seed is not None, "there is dropout"
    rows, columns = x.shape
    if path == "reference":
        keep = branches_reference.dropout_mask(seed, rows, columns, dropout, branch)
        term = torch.where(keep, x * (65536 / (65536 - threshold(dropout))), 0.0)
        out.copy_(term) if what == "dropout" else out.add_(term)
        return
    if path == "cuda":
        _refuse_float64(x, path)
    module: Any = dispatch.core(path)
    with torch.cuda.device(x.device) if path == "cuda" else nullcontext():
        module.dropout(
            _LETTER[x.dtype],
            what == "dropout_add",
            x.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            x.stride(0),
            out.stride(0),
            seed.data_ptr(),
            threshold(dropout),
            branch,
            torch.get_num_threads() if path == "cpp" else torch.cuda.current_stream().cuda_stream,
        )


def _refuse_float64(x: Tensor, path: str) -> None:
    if x.dtype == torch.float64:
        raise UserError(f"lora_branches: impl={path!r} has no float64 with dropout; take impl='reference'")


def _triton(what: str, first: Tensor, second: Tensor, out: Tensor, random: Random, branch: int) -> None:
    from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

    _refuse_float64(first, "triton")
    seed, dropout, _, _ = random
    getattr(branches, f"run_{what}")(first, second, out, seed, threshold(dropout), branch)


def mask(seed: Tensor, rows: int, columns: int, dropout: float, branch: int, path: str) -> Tensor:
    """Which elements of (rows, columns) are kept."""
    if path == "triton":
        from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

        keep = seed.new_empty((rows, columns), dtype=torch.bool)
        branches.run_mask(keep, seed, threshold(dropout), branch)
        return keep
    ones = torch.ones(rows, columns, device=seed.device)
    return _dropped(ones, (seed, dropout, False, path), branch) != 0
