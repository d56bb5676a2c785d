"""The ops of moving averages: Fisher accumulation and the averaging steps, over lists of tensors, in place.

Every list holds tensors of one device; the tensors of an index have one shape. State is float32; parameters and
gradients are float32 or bfloat16. Tensors that are written may share memory with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.ops import checks, dispatch, reference

_LIBRARY = torch.library.Library("cnext", "FRAGMENT")
_LETTER = {torch.float32: "f", torch.bfloat16: "b"}


@dataclass(frozen=True)
class Op:
    """One op over lists of tensors.

    name: as registered.  rule: the kernels' name of it.
    roles: argument name to role (see `checks.metadata`), in the order of the signature.
    order: argument names as the kernels take them; the first ``outputs`` are written.
    scalars: names of the numbers, in the kernels' order, with their defaults (None: required).
    columns: width of the float64 statistics, (tensors, columns); 0 where the op returns nothing.
    """

    name: str
    rule: str
    roles: Mapping[str, str]
    order: tuple[str, ...]
    outputs: int
    scalars: Mapping[str, float | None]
    columns: int

    @property
    def written(self) -> tuple[str, ...]:
        return self.order[: self.outputs]

    @property
    def schema(self) -> str:
        alias = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(self.written)}
        lists = [f"Tensor{alias.get(name, '')}[] {name}" for name in self.roles]
        numbers = [f"float {name}" + ("" if value is None else f"={value}") for name, value in self.scalars.items()]
        arguments = ", ".join([*lists, "*", *numbers, "str? impl=None"])
        return f"{self.name}({arguments}) -> {'Tensor' if self.columns else '()'}"

    def statistics(self, like: Tensor, tensors: int) -> Tensor | None:
        return like.new_empty((tensors, self.columns), dtype=torch.float64) if self.columns else None

    def fake(self, *lists: list[Tensor], impl: str | None = None, **scalars: float) -> Tensor | None:
        checks.metadata(self.name, dict(zip(self.roles, lists, strict=True)), self.roles)
        return self.statistics(lists[0][0], len(lists[0]))

    def run(self, *lists: list[Tensor], impl: str | None = None, **scalars: float) -> Tensor | None:
        named = dict(zip(self.roles, lists, strict=True))
        checks.metadata(self.name, named, self.roles)
        checks.layout(self.name, named)
        ordered = {name: named[name] for name in self.order}
        pointers = checks.addresses(self.name, ordered, self.written)
        path = dispatch.choose(self.name, lists[0][0].device.type, impl)
        scalars = {name: scalars.get(name, default) for name, default in self.scalars.items()}
        if path == "reference":
            with torch.no_grad():
                out = getattr(reference, self.name)(*lists, **scalars)
            return out.view(len(lists[0]), self.columns) if self.columns else None
        out = self.statistics(lists[0][0], len(lists[0]))
        _launch(path, self, ordered, pointers, list(scalars.values()), out)
        torch.autograd.graph.increment_version([tensor for name in self.written for tensor in named[name]])
        return out


def _launch(
    path: str,
    op: Op,
    ordered: dict[str, list[Tensor]],
    pointers: numpy.ndarray,
    scalars: list[float],
    out: Tensor | None,
) -> None:
    """Runs the kernels of ``op`` on one of the compiled paths."""
    base = ordered[op.order[0]]
    if path == "triton":
        from cnext.kernels import averaging as triton_kernels

        triton_kernels.foreach(op.rule, ordered, pointers, scalars, out)
        return
    dtypes = "".join(_LETTER[tensors[0].dtype] for tensors in ordered.values())
    sizes = numpy.array([tensor.numel() for tensor in base], dtype=numpy.int64)
    columns = 0 if out is None else out.data_ptr()
    module: Any = dispatch.core(path)
    if path == "cpp":
        module.foreach(op.rule, dtypes, pointers, sizes, scalars, columns=columns, threads=torch.get_num_threads())
        return
    blocks = module.blocks(sizes)
    workspace = torch.empty((blocks, op.columns), dtype=torch.float64, device=base[0].device) if op.columns else None
    tickets = torch.zeros(len(base), dtype=torch.int32, device=base[0].device) if op.columns else None
    with torch.cuda.device(base[0].device):
        module.foreach(
            op.rule,
            dtypes,
            pointers,
            sizes,
            scalars,
            columns=columns,
            partial=0 if workspace is None else workspace.data_ptr(),
            tickets=0 if tickets is None else tickets.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )


_FISHER = {"fisher": "s", "grad": "p"}
_MERGE = {"theta": "p", "theta_old": "p", "fisher_new": "s", "fisher_old": "s"}
OPS = {
    op.name: op
    for op in (
        Op("fisher_accumulate_", "fisher_accumulate", _FISHER, ("fisher", "grad"), 1, {"scale": 1.0}, 0),
        Op("sums", "sums", {"tensors": "s"}, ("tensors",), 0, {}, 1),
        Op(
            "pema_merge_",
            "pema_merge",
            _MERGE,
            ("theta", "fisher_old", "theta_old", "fisher_new"),
            2,
            {"new_scale": None, "c": 5.0, "damping": 1e-5},
            5,
        ),
    )
}
for _op in OPS.values():
    _LIBRARY.define(_op.schema)
    _LIBRARY.impl(_op.name, _op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cnext::{_op.name}", _op.fake, lib=_LIBRARY)


def fisher_accumulate_(
    fisher: list[Tensor], grad: list[Tensor], *, scale: float = 1.0, impl: str | None = None
) -> None:
    """fisher += scale * grad^2, in place, in one pass. An element whose square is not finite is skipped.

    Args:
        fisher: float32 tensors, written.
        grad: float32 or bfloat16 tensors of the same shapes.
        scale: factor of the square.
        impl: "cpp", "cuda", "triton" or "reference"; None for the device's best.

    Raises:
        UserError: a tensor's dtype, shape, device or layout is wrong, memory is shared, or ``impl`` is missing.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 2.
    """
    if fisher or grad:
        torch.ops.cnext.fisher_accumulate_(fisher, grad, scale=scale, impl=impl)


def sums(tensors: list[Tensor], *, impl: str | None = None) -> Tensor:
    """The sum of each float32 tensor, (tensors,) float64; the same for any number of threads.

    Raises:
        UserError: as `fisher_accumulate_`.
    """
    if not tensors:
        return torch.empty(0, dtype=torch.float64)
    return torch.ops.cnext.sums(tensors, impl=impl).view(-1)


def pema_merge_(
    theta: list[Tensor],
    theta_old: list[Tensor],
    fisher_new: list[Tensor],
    fisher_old: list[Tensor],
    *,
    new_scale: float,
    c: float = 5.0,
    damping: float = 1e-5,
    impl: str | None = None,
) -> Tensor:
    """The damped-inverse merge at the end of a task, in place, in one pass.

    theta <- beta theta_old + (1 - beta) theta,  beta = mu / (f + mu + damping),  mu = fisher_old / c,
    f = new_scale * fisher_new;  then fisher_old <- fisher_old + f. Where fisher_old is 0, beta is 0 and theta stays.
    beta minimises f/2 (x - theta)^2 + mu/2 (x - theta_old)^2, the two tasks' losses to second order.

    Args:
        theta: float32 or bfloat16 parameters after the task, written.
        theta_old: the same before the task.
        fisher_new: float32, the task's Fisher information in any unit; a value that is not finite counts as 0.
        fisher_old: float32, the sum over earlier tasks, written.
        new_scale: brings ``fisher_new`` to the unit of ``fisher_old``.
        c: plasticity; larger keeps less of the old.
        damping: lambda of Eq. 3.
        impl: as in `fisher_accumulate_`.

    Returns:
        (tensors, 5) float64: number, sum, sum of squares, least and most of beta, per tensor.

    Raises:
        UserError: as `fisher_accumulate_`.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 3 and 4, with the damping given per parameter.
    """
    if not theta:
        return torch.empty((0, 5), dtype=torch.float64)
    return torch.ops.cnext.pema_merge_(
        theta, theta_old, fisher_new, fisher_old, new_scale=new_scale, c=c, damping=damping, impl=impl
    )
