"""Ops of the Kronecker-factored Fisher information: accumulation, pull and merge over groups of matrices side by side.

A group is a set of matrices G_p, (n, r_p) each, that share their n rows; side by side they are G, (n, r) with
r = sum of r_p <= `MOST_RANK`. Its Fisher information is diag(rows) (x) factor: row i of G has the r x r block
rows[i] * factor, and different rows are independent.

In every op, lists over groups hold one tensor a group: ``rows`` (n,) and ``factor`` (r, r), float32. Lists over parts
hold one tensor a matrix, group after group; ``parts`` has the number of matrices of each group, and ``axes`` the
dimension of each matrix that is its rank: 1 for (n, r_p), 0 for a matrix that is stored transposed, (r_p, n). They are
contiguous, and float32, bfloat16 or float16, all lists over parts of one dtype. All tensors are on one device. Results
do not depend on the number of threads.

impl: "cpp", "cuda", "triton" or "reference"; None for the fastest on the device, see `cnext.ops.dispatch`.

Every op raises `cnext.errors.UserError` where a tensor's dtype, shape, device or layout does not fit, where what is
written shares memory, and where ``impl`` is unknown or cannot run. The error names the tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import checks, dispatch, kron_reference
from cnext.ops.dispatch import Impl
from cnext.ops.foreach import LETTER, LIBRARY

MOST_RANK = 64
"""Largest total rank r of a group."""
ROUNDING = 2.0**-20
"""Share of its largest eigenvalue below which an eigenvalue of a float32 factor may be rounding alone."""


@dataclass(frozen=True)
class KronOp:
    """Declaration of an op over groups of matrices.

    name: as registered, and of its function in `cnext.ops.kron_reference`.
    lists: argument names in the order of the signature, and what each holds: "part", or for every group "rows" (n,),
        "values" (r,) or "factor" (r, r).
    written: the lists that are written.
    scalars: names of the scalars, in the kernels' order.
    precise: the lists that kernels and reference get in float64, by `semidefinite`.
    """

    name: str
    lists: Mapping[str, str]
    written: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()

    @property
    def matrices(self) -> list[str]:
        """The lists over parts."""
        return [name for name, kind in self.lists.items() if kind == "part"]

    @property
    def schema(self) -> str:
        alias = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(self.written)}
        lists = [f"Tensor{alias.get(name, '')}[] {name}" for name in self.lists]
        arguments = [*lists, "int[] parts", "int[] axes", "*", *(f"float {name}" for name in self.scalars)]
        return f"{self.name}({', '.join([*arguments, 'str? impl=None'])}) -> ()"

    def register(self) -> None:
        """Registers ``torch.ops.cnext.<name>`` for every device and for fake tensors."""
        LIBRARY.define(self.schema)
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        # No gradient flows through these ops.
        LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"cnext::{self.name}", self.fake, lib=LIBRARY)

    def fake(self, *arguments: Any, impl: str | None = None, **scalars: float) -> None:
        *given, parts, axes = arguments
        _layout(self, dict(zip(self.lists, given, strict=True)), parts, axes)

    @torch.no_grad()
    def run(self, *arguments: Any, impl: str | None = None, **scalars: float) -> None:
        *given, parts, axes = arguments
        lists: dict[str, list[Tensor]] = dict(zip(self.lists, given, strict=True))
        tables = {name: checks.table(tensors) for name, tensors in lists.items()}
        rows = numpy.concatenate([*tables.values()])
        key = (self.name, tuple(parts), tuple(axes), rows[:, [checks.KIND, checks.LAYOUT]].tobytes())
        if (known := _KNOWN.get(key)) is None:
            known = _Known(_layout(self, lists, parts, axes))
            if len(_KNOWN) >= MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = known
        addresses = rows[:, checks.ADDRESS].copy()
        if known.addresses is None or not numpy.array_equal(addresses, known.addresses):
            checks.require_disjoint(self.name, lists, tables, self.written)
            known.addresses = addresses
        layout = known.layout
        for name in self.precise:
            lists[name] = [semidefinite(factor) for factor in lists[name]]
            tables[name] = checks.table(lists[name])
        path = dispatch.choose(self.name, layout.device.type, impl)
        if path == "reference":
            getattr(kron_reference, self.name)(*lists.values(), parts, axes, **scalars)
        else:
            over_parts, over_groups = (
                numpy.concatenate(
                    [tables[name][:, checks.ADDRESS] for name, kind in self.lists.items() if (kind == "part") == of]
                ).reshape(-1, size)
                for of, size in ((True, len(axes)), (False, len(parts)))
            )
            numbers = [float(scalars[name]) for name in self.scalars]
            _launch(path, self.name.strip("_"), layout, over_parts, over_groups, numbers)
        torch.autograd.graph.increment_version([tensor for name in self.written for tensor in lists[name]])


@dataclass(frozen=True)
class Layout:
    """Sizes of a call's groups and matrices, for the kernels.

    groups: (groups, 4) int64: n, r, index of the first matrix, number of matrices.
    parts: (matrices, 3) int64: rank, and in elements the strides along n and along the rank.
    letter: dtype of the matrices: f float32, b bfloat16, h float16.
    """

    groups: numpy.ndarray
    parts: numpy.ndarray
    letter: str
    device: torch.device


@dataclass
class _Known:
    """What calls of one layout need not check again: the layout, and addresses of which nothing overlaps."""

    layout: Layout
    addresses: numpy.ndarray | None = None


MOST_KNOWN = 16  # a model has one set of groups, or a few, for each op
_KNOWN: dict[tuple[Any, ...], _Known] = {}
"""By the op, ``parts``, ``axes``, and the dtypes, shapes and strides of every list."""


def _layout(op: KronOp, lists: Mapping[str, Sequence[Tensor]], parts: Sequence[int], axes: Sequence[int]) -> Layout:
    """The layout of a call, after checks of every list.

    Raises:
        UserError: names the first tensor or list that does not fit, what was expected and what came.
    """
    name = op.name
    if any(count < 1 for count in parts) or sum(parts) != len(axes) or any(axis not in (0, 1) for axis in axes):
        raise UserError(
            f"{name}: expected parts with the number of matrices of each group, at least 1, and for each matrix an "
            f"axis of 0 or 1; got parts {list(parts)} and axes {list(axes)}"
        )
    for label, tensors in lists.items():
        expected = len(axes) if op.lists[label] == "part" else len(parts)
        if len(tensors) != expected:
            raise UserError(f"{name}: {label} has {len(tensors)} tensors; expected {expected}")
    matrices = op.matrices[0]
    base = lists[matrices][0]
    groups, sizes = [], []
    for index, count in enumerate(parts):
        first = len(sizes)
        n = 0
        for at in range(first, first + count):
            matrix, axis = lists[matrices][at], axes[at]
            if matrix.ndim != 2 or not matrix.numel() or (at > first and matrix.shape[1 - axis] != n):
                like = f" with {n} along dimension {1 - axis}, as the first of its group" if at > first else ""
                raise UserError(f"{name}: {matrices}[{at}] has shape {tuple(matrix.shape)}; expected a matrix{like}")
            n, rank = matrix.shape[1 - axis], matrix.shape[axis]
            sizes.append((rank, rank, 1) if axis else (rank, 1, n))
        r = sum(rank for rank, *_ in sizes[first:])
        if r > MOST_RANK:
            raise UserError(f"{name}: the matrices of group {index} have a total rank of {r}; at most {MOST_RANK}")
        groups.append((n, r, first, count))
    for label, kind in op.lists.items():
        for at, tensor in enumerate(lists[label]):
            shape = {
                "part": lambda at=at: lists[matrices][at].shape,
                "rows": lambda at=at: torch.Size([groups[at][0]]),
                "values": lambda at=at: torch.Size([groups[at][1]]),
                "factor": lambda at=at: torch.Size([groups[at][1]] * 2),
            }[kind]()
            allowed = checks.STATE if kind != "part" else (base.dtype,) if base.dtype in checks.PARAM else checks.PARAM
            checks.require_tensor(f"{name}: {label}[{at}]", tensor, allowed, shape, base.device, f"that of {label}", at)
            if not tensor.is_contiguous():
                raise UserError(f"{name}: {label}[{at}] has strides {tensor.stride()}; expected a contiguous tensor")
    as_array = numpy.ascontiguousarray
    return Layout(as_array(groups, numpy.int64), as_array(sizes, numpy.int64), LETTER[base.dtype], base.device)


def _launch(
    path: str, op: str, layout: Layout, parts: numpy.ndarray, groups: numpy.ndarray, scalars: list[float]
) -> None:
    """Runs a kernel. parts, groups: (lists, matrices) and (lists, groups) int64 addresses."""
    if path == "triton":
        kernels: Any = importlib.import_module(f"{dispatch.ROOT}.kernels.kron")
        kernels.run(op, layout, parts, groups, scalars)
        return
    core: Any = dispatch.core(path)
    arguments = (op, layout.letter, layout.groups, layout.parts, parts, groups, scalars)
    if path == "cpp":
        core.kron(*arguments, torch.get_num_threads())
        return
    with dispatch.on(layout.device):
        size = core.kron_workspace(op, layout.groups)
        space = torch.empty(size, dtype=torch.uint8, device=layout.device)
        core.kron(*arguments, space.data_ptr(), torch.cuda.current_stream().cuda_stream)


OPS = {
    op.name: op
    for op in (
        KronOp("kron_accumulate_", {"rows": "rows", "factor": "factor", "grad": "part"}, ("rows", "factor")),
        KronOp(
            "kron_pull_",
            {"theta": "part", "theta_start": "part", "rows": "rows", "values": "values", "vectors": "factor"},
            ("theta",),
            ("weight",),
        ),
        KronOp(
            "kron_merge_",
            {
                "theta": "part",
                "theta_start": "part",
                "rows_new": "rows",
                "factor_new": "factor",
                "rows_old": "rows",
                "factor_old": "factor",
            },
            ("theta",),
            ("c", "damping"),
            precise=("factor_new", "factor_old"),
        ),
    )
}
for _op in OPS.values():
    _op.register()


def semidefinite(factor: Tensor) -> Tensor:
    """A symmetric factor in float64, without what is of the size of its rounding to float32.

    That has no definite sign, and in a system with little damping would become most of the solution.
    """
    values, vectors = torch.linalg.eigh(factor.double().cpu())
    values = torch.where(values > ROUNDING * values[-1], values, 0.0)
    return ((vectors * values) @ vectors.T).to(factor.device)


def kron_accumulate_(
    rows: list[Tensor],
    factor: list[Tensor],
    grad: list[Tensor],
    parts: list[int],
    axes: list[int],
    *,
    impl: Impl | None = None,
) -> None:
    """rows <- rows + row sums of G^2, factor <- factor + G^T G, in place, in one pass over the gradients.

    A row of G with a square that is not finite counts as zeros.

    Args:
        rows, factor: float32, written.
        grad: the gradients of each group's matrices, float32, bfloat16 or float16.
        parts, axes: see the module.

    Example:
        >>> rows, factor = [torch.zeros(2)], [torch.zeros(2, 2)]
        >>> grad = [torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0, 3.0]])]  # (2, 1), and (1, 2) transposed
        >>> kron_accumulate_(rows, factor, grad, [2], [1, 0])
        >>> rows[0], factor[0]
        (tensor([ 1., 13.]), tensor([[5., 6.],
                [6., 9.]]))

    Reference: the project's own; Kronecker factors as Gupta et al., Shampoo, arXiv 1802.09568.
    """
    if parts:
        torch.ops.cnext.kron_accumulate_(rows, factor, grad, parts, axes, impl=impl)


def kron_pull_(
    theta: list[Tensor],
    theta_start: list[Tensor],
    rows: list[Tensor],
    values: list[Tensor],
    vectors: list[Tensor],
    parts: list[int],
    axes: list[int],
    *,
    weight: float,
    impl: Impl | None = None,
) -> None:
    """A proximal step of a quadratic penalty towards the values from before a task, in place, in one pass.

    theta_i <- theta_start_i + d_i (I + weight rows[i] R)^-1,  d_i = theta_i - theta_start_i,  for every row i, with
    R = Q diag(values) Q^T and Q = vectors: d_i Q diag(1 / (1 + weight rows[i] values)) Q^T. The result minimizes
    1/2 |x - theta_i|^2 + weight / 2 (x - theta_start_i) rows[i] R (x - theta_start_i)^T, for any weight.

    Args:
        theta: each group's matrices, written.
        theta_start: their values from before the task.
        rows: the Fisher information of earlier tasks by row.
        values, vectors: float32, (r,) not negative and (r, r): eigenvalues, and eigenvectors in columns, of its factor.
        parts, axes: see the module.
        weight: of the penalty, at least 0.

    Example:
        >>> theta, start = [torch.ones(2, 1)], [torch.zeros(2, 1)]
        >>> rows, values, vectors = [torch.tensor([1.0, 3.0])], [torch.ones(1)], [torch.eye(1)]
        >>> kron_pull_(theta, start, rows, values, vectors, [1], [1], weight=1.0)
        >>> theta[0].flatten()
        tensor([0.5000, 0.2500])

    Reference: the project's own; decoupled from the gradient as weight decay in AdamW, arXiv 1711.05101.
    """
    if parts:
        lists = (theta, theta_start, rows, values, vectors)
        torch.ops.cnext.kron_pull_(*lists, parts, axes, weight=weight, impl=impl)


def kron_merge_(
    theta: list[Tensor],
    theta_start: list[Tensor],
    rows_new: list[Tensor],
    factor_new: list[Tensor],
    rows_old: list[Tensor],
    factor_old: list[Tensor],
    parts: list[int],
    axes: list[int],
    *,
    c: float,
    damping: float,
    impl: Impl | None = None,
) -> None:
    """Merges matrices with their values from before a task, row by row, weighted by r x r blocks; in place.

    theta_i <- theta_i + (theta_start_i - theta_i) beta_i,  beta_i = M_i (M_i + F_i + damping I)^-1,
    M_i = rows_old[i] factor_old / c,  F_i = rows_new[i] factor_new. With diagonal factors this is `pema_merge_`. beta
    minimizes 1/2 (x - theta) F (x - theta)^T + 1/2 (x - theta_start) M (x - theta_start)^T, the two tasks' losses to
    second order. The factors are symmetric and positive semidefinite; the blocks are solved in float64.

    Args:
        theta: each group's matrices after the task, written.
        theta_start: the same before the task.
        rows_new, factor_new: the task's Fisher information.
        rows_old, factor_old: that of earlier tasks, in the same unit.
        parts, axes: see the module.
        c: plasticity, positive; larger keeps less of the old.
        damping: positive, in the unit of the Fisher information.

    Raises:
        UserError: ``c`` or ``damping`` is not positive, besides what the module names.

    Example:
        >>> theta, one = [torch.ones(1, 2)], [torch.ones(1)]
        >>> old = [torch.tensor([[1.0, 0.5], [0.5, 1.0]])]
        >>> kron_merge_(theta, [torch.zeros(1, 2)], one, [torch.eye(2)], one, old, [1], [1], c=1.0, damping=0.5)
        >>> theta[0]
        tensor([[0.5000, 0.5000]])

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 3 and 4, with blocks in place of numbers.
    """
    for name, value in (("c", c), ("damping", damping)):
        if not value > 0:
            raise UserError(f"kron_merge_: {name} is {value}; expected a positive number")
    if parts:
        lists = (theta, theta_start, rows_new, factor_new, rows_old, factor_old)
        torch.ops.cnext.kron_merge_(*lists, parts, axes, c=c, damping=damping, impl=impl)
