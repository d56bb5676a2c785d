"""The passes over x and dX that see dropout, each a low-rank product too: one kernel in Triton; in C++ and CUDA ours
does the dropout and torch the product. Without dropout each is a product of torch's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch
from cnext.ops.branches_reference import threshold

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


def _passes(ranks: Sequence[int], linears: int, dropout: Dropout) -> Iterator[tuple[int, list[slice]]]:
    """One mask's number, and the columns of h that it belongs to in every linear layer."""
    rank = sum(ranks)
    if not dropout.independent:
        yield 0, [slice(0, linears * rank)]
        return
    for branch, (end, width) in enumerate(zip(accumulate(ranks), ranks, strict=True)):
        yield branch, [slice(g * rank + end - width, g * rank + end) for g in range(linears)]


def projected(x: Tensor, a: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """h = drop(x) A^T."""
    if not dropout.probability:
        return F.linear(x, a)
    h = x.new_empty(x.shape[0], a.shape[0])
    for branch, parts in _passes(ranks, linears, dropout):
        dropped = None if dropout.impl == "triton" else _dropped(x, dropout, branch)
        for columns in parts:
            if dropped is None:
                _triton("project", x, a[columns], h[:, columns], dropout, branch)
            else:
                torch.mm(dropped, a[columns].T, out=h[:, columns])
    return h


def spread(dx: Tensor, dh: Tensor, a: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> None:
    """dx += drop'(dh A), in place."""
    if not dropout.probability:
        dx.addmm_(dh, a)
        return
    for branch, parts in _passes(ranks, linears, dropout):
        for columns in parts:
            if dropout.impl == "triton":
                _triton("spread", dh[:, columns], a[columns], dx, dropout, branch, add=True)
            else:
                _launch("dropout_add", dh[:, columns] @ a[columns], dx, dropout, branch)


def weighed(dh: Tensor, x: Tensor, ranks: Sequence[int], linears: int, dropout: Dropout) -> Tensor:
    """dA = dh^T drop(x)."""
    if not dropout.probability:
        return dh.T @ x
    da = x.new_empty(dh.shape[1], x.shape[1])
    for branch, parts in _passes(ranks, linears, dropout):
        dropped = None if dropout.impl == "triton" else _dropped(x, dropout, branch)
        for columns in parts:
            if dropped is None:
                _triton("weigh", dh[:, columns], x, da[columns], dropout, branch)
            else:
                torch.mm(dh[:, columns].T, dropped, out=da[columns])
    return da


def _dropped(x: Tensor, dropout: Dropout, branch: int) -> Tensor:
    """keep o x / (1 - p), a copy."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch("dropout", x, out, dropout, branch)
    return out


def _launch(what: str, x: Tensor, out: Tensor, dropout: Dropout, branch: int) -> None:
    """out = drop(x) ("dropout") or out += drop(x) ("dropout_add"); x: (rows, columns), its columns side by side."""
    seed, path, limit = dropout.seed, dropout.impl, threshold(dropout.probability)
    assert seed is not None, "there is dropout"
    rows, columns = x.shape
    if path == "torch":
        keep = branches_reference.dropout_mask(seed, rows, columns, dropout.probability, branch)
        term = torch.where(keep, x * (65536 / (65536 - limit)), 0.0)
        out.copy_(term) if what == "dropout" else out.add_(term)
        return
    if path == "cuda":
        _refuse_float64(x, path)
    if not x.numel():
        return
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
            limit,
            branch,
            torch.get_num_threads() if path == "cpp" else torch.cuda.current_stream().cuda_stream,
        )
    dropout.launched = True


def _refuse_float64(x: Tensor, path: str) -> None:
    if x.dtype == torch.float64:
        raise UserError(f"lora_branches: impl={path!r} has no float64 with dropout; take impl='torch'")


def _triton(
    what: str, first: Tensor, second: Tensor, out: Tensor, dropout: Dropout, branch: int, **options: bool
) -> None:
    from cnext.kernels import branches  # pyright: ignore[reportMissingImports]

    _refuse_float64(first, "triton")
    limit = threshold(dropout.probability)
    getattr(branches, f"run_{what}")(first, second, out, dropout.seed, limit, branch, **options)
    dropout.launched |= bool(out.numel())  # the launcher leaves out what would write nothing


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
        keep = _dropped(torch.ones(rows, columns, device=seed.device), dropout, branch) != 0
    return keep, dropout.ran
