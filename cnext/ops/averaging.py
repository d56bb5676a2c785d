"""The ops of moving averages: Fisher accumulation and the averaging steps, over lists of tensors, in place.

Every list holds tensors of one device; the tensors of an index have one shape and one dense layout. State is float32;
parameters and gradients are float32, bfloat16 or float16, and so is an ``ema``, with one 16-bit dtype in a call. What
is written may share memory with nothing else. Every op takes ``impl``: "cpp", "cuda", "triton" or "reference"; None
for the device's best. An op raises `cnext.errors.UserError` where a tensor's dtype, shape, device or layout is wrong,
memory is shared, or ``impl`` is missing. Gradients and parameters that are not finite are skipped element by element:
they never reach a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnext.errors import UserError, unknown
from cnext.ops.foreach import Prepared
from cnext.ops.rules import OPS, adamw_numbers, literal_numbers

for _op in OPS.values():
    _op.register()


def prepare(op: str, *lists: list[Tensor] | None, impl: str | None = None) -> Prepared:
    """An op whose lists of tensors are checked once, to be called at every step with little work of the host.

        step = ops.prepare("pema_step_", theta, None, fisher, ema)
        step(level, grad=[parameter.grad for parameter in parameters])

    Args:
        op: name of a function of this module that works on lists, such as "pema_step_".
        lists: its lists of tensors, in its order, none of them empty; None in place of one that is only read and that
            every call gives anew.
        impl: as the op's.

    Returns:
        A `cnext.ops.foreach.Prepared`, called with the rest of the op's arguments; its result is the op's.

    Raises:
        UserError: as the op; ``op`` is not known.
    """
    if op not in OPS:
        raise unknown("op", op, list(OPS))
    if op == "adamw_pema_step_" and len(lists) == 6 and lists[4] is None:
        op, lists = "adamw_pema_step_shared_", (*lists[:4], lists[5])
    roles = OPS[op].roles
    if len(lists) != len(roles):
        raise UserError(f"prepare: {op} takes {len(roles)} lists, {', '.join(roles)}; got {len(lists)}")
    return Prepared(OPS[op], dict(zip(roles, lists, strict=True)), impl)


def fisher_accumulate_(
    fisher: list[Tensor], grad: list[Tensor], *, scale: float = 1.0, impl: str | None = None
) -> None:
    """fisher += scale * grad^2, in place, in one pass.

    Args:
        fisher: float32, written.
        grad: float32, bfloat16 or float16.
        scale: factor of the square.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 2.
    """
    if fisher or grad:
        torch.ops.cnext.fisher_accumulate_(fisher, grad, scale=scale, impl=impl)


def sums(tensors: list[Tensor], *, impl: str | None = None) -> Tensor:
    """The sum of each float32 tensor, (tensors,) float64; compiled, the same for any number of threads."""
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
    beta minimises f/2 (x - theta)^2 + mu/2 (x - theta_old)^2, the two tasks' losses to second order. A theta that is
    not finite stays so: it is the model itself, not a state.

    Args:
        theta: float32, bfloat16 or float16 parameters after the task, written.
        theta_old: the same before the task.
        fisher_new: float32, the task's Fisher information in any unit.
        fisher_old: float32, the sum over earlier tasks, written.
        new_scale: brings ``fisher_new`` to the unit of ``fisher_old``.
        c: plasticity; larger keeps less of the old.
        damping: lambda of Eq. 3.

    Returns:
        (tensors, 5) float64: number, sum, sum of squares, least and most of beta, per tensor.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 3 and 4, with the damping given per parameter.
    """
    if not theta:
        return torch.empty((0, 5), dtype=torch.float64)
    return torch.ops.cnext.pema_merge_(
        theta, theta_old, fisher_new, fisher_old, new_scale=new_scale, c=c, damping=damping, impl=impl
    )


def ema_step_(theta: list[Tensor], ema: list[Tensor], *, beta: float, impl: str | None = None) -> None:
    """ema <- beta ema + (1 - beta) theta, in place, in one pass.

    Args:
        theta: float32, bfloat16 or float16.
        ema: float32, bfloat16 or float16, written.
    """
    if theta or ema:
        torch.ops.cnext.ema_step_(theta, ema, beta=beta, impl=impl)


def pema_step_(
    theta: list[Tensor],
    grad: list[Tensor],
    fisher: list[Tensor],
    ema: list[Tensor],
    level: Tensor,
    *,
    decay: float = 1.0,
    scale: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """Fisher accumulation and the per-step average, in place, in one pass.

    fisher <- decay fisher + scale grad^2,  beta = level / (fisher + level), 1 where both are 0,
    ema <- beta ema + (1 - beta) theta.

    Args:
        theta, grad: float32, bfloat16 or float16.
        fisher: float32, written.
        ema: float32, bfloat16 or float16, written.
        level: (tensors,) float64 on the same device, at least 0: the damping lambda of each tensor.

    Returns:
        (tensors, 4) float64: elements used, sum of the new fisher, sum of beta, sum of beta^2.
    """
    if not theta:
        return torch.empty((0, 4), dtype=torch.float64)
    return torch.ops.cnext.pema_step_(theta, grad, fisher, ema, level, decay=decay, scale=scale, impl=impl)


def pema_literal_(
    theta: list[Tensor],
    grad: list[Tensor],
    fisher: list[Tensor],
    ema: list[Tensor],
    *,
    decay: float = 0.0,
    scale: float = 1.0,
    damping: float = 1e-5,
    guard: str = "fallback",
    fallback: float = 0.99,
    impl: str | None = None,
) -> Tensor:
    """The paper's equation element by element, in place, in one pass.

    fisher <- decay fisher + scale grad^2,  beta = (grad + 1) / ((theta - ema) fisher + damping),
    ema <- beta ema + (1 - beta) theta. Where beta is not inside (0, 1), guard "fallback" takes the constant
    ``fallback`` instead, and "clamp" the nearer end.

    Args:
        theta, grad: float32, bfloat16 or float16.
        fisher: float32, written.
        ema: float32, bfloat16 or float16, written.

    Returns:
        (tensors, 4) float64: elements used, beta inside (0, 1), beta at or below 0, beta at or above 1.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 4 and its released code.
    """
    _, numbers = literal_numbers(guard=guard, decay=decay, scale=scale, damping=damping, fallback=fallback)
    if not theta:
        return torch.empty((0, 4), dtype=torch.float64)
    return torch.ops.cnext.pema_literal_(theta, grad, fisher, ema, **numbers, impl=impl)


def dema_step_(
    theta: list[Tensor],
    grad: list[Tensor],
    ema: list[Tensor],
    grad_prev: list[Tensor],
    *,
    factor: float = 2.0,
    fallback: float = 0.01,
    impl: str | None = None,
) -> Tensor:
    """CIA's dynamic average, one weight per tensor, in place, in two passes and without waiting for the device.

    a = |theta - ema|_1,  b = |grad|_1,  c = |grad - grad_prev|_1,  alpha = factor (1 + b) / (a c), or ``fallback``
    where that is not inside (0, 1);  ema <- (1 - alpha) ema + alpha theta;  grad_prev <- grad. A gradient that is not
    finite makes its tensor take the fallback.

    Args:
        theta, grad: float32, bfloat16 or float16.
        ema: float32, bfloat16 or float16, written.
        grad_prev: the last step's gradient, of the dtype of ``grad``, written.

    Returns:
        (tensors, 3) float64: a, b, c.

    Reference: Qiao et al., CIA, ICML 2025, as released.
    """
    if not theta:
        return torch.empty((0, 3), dtype=torch.float64)
    return torch.ops.cnext.dema_step_(theta, grad, ema, grad_prev, factor=factor, fallback=fallback, impl=impl)


def pema_released_(
    theta: list[Tensor],
    grad: list[Tensor],
    ema: list[Tensor],
    *,
    damping: float = 1e-5,
    fallback: float = 0.99,
    impl: str | None = None,
) -> None:
    """The formula of the released loop on matrices (p, q), in place, through its exact low-rank identity.

    alpha = (G + 1) (D^T F + damping I)^-1,  D = theta - ema,  F = G o G;  ema <- alpha o ema + (1 - alpha) o theta.
    For p < q the q x q inverse is never formed: alpha = ((G + 1) - (G + 1) D^T (damping I + F D^T)^-1 F) / damping.
    A singular matrix takes ``fallback``. The rule diverges, in float32 too; it is here to be compared with.

    Args:
        theta, grad: float32, bfloat16 or float16, two-dimensional.
        ema: float32, bfloat16 or float16, written.

    Reference: the code released with Continual-NExT, arXiv 2602.18055; Woodbury, 1950.
    """
    for i, tensor in enumerate(theta):
        if tensor.ndim != 2:
            raise UserError(f"pema_released_: theta[{i}] has shape {tuple(tensor.shape)}; expected a matrix")
    if theta:
        torch.ops.cnext.pema_released_(theta, grad, ema, damping=damping, fallback=fallback, impl=impl)


def adamw_pema_step_(
    theta: list[Tensor],
    grad: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    fisher: list[Tensor] | None,
    ema: list[Tensor],
    level: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: float = 1.0,
    scale: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """One step of AdamW and then `pema_step_` on its result, in place, in one pass.

    Args:
        theta, grad: float32, bfloat16 or float16; theta is written.
        exp_avg, exp_avg_sq: float32 moments, written.
        fisher: float32, written; None takes ``exp_avg_sq`` as the Fisher information and so needs no state for it.
        ema: float32, bfloat16 or float16, written.
        level: as `pema_step_`.
        step: number of this step, from 1; 0-d tensors on the device for ``step`` and ``lr`` make it capturable.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.

    Returns:
        As `pema_step_`.
    """
    if not theta:
        return torch.empty((0, 4), dtype=torch.float64)
    (rows,), scalars = adamw_numbers(level, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if fisher is None:
        return torch.ops.cnext.adamw_pema_step_shared_(
            theta, grad, exp_avg, exp_avg_sq, ema, rows, **scalars, impl=impl
        )
    return torch.ops.cnext.adamw_pema_step_(
        theta, grad, exp_avg, exp_avg_sq, fisher, ema, rows, **scalars, decay=decay, scale=scale, impl=impl
    )
