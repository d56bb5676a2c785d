"""Averaging ops: Fisher accumulation and averaging steps over lists of tensors, in place.

A list holds tensors of one device; tensors of the same index have one shape and the same dense strides. State is
float32; parameters and gradients are float32, bfloat16 or float16, and so is an ``ema``, with one 16-bit dtype in a
call. What is written shares memory with nothing else. Elements whose parameter or squared gradient is not finite are
skipped and never reach a state. No op allocates more than its statistics, except where it says so; empty lists are
allowed.

impl: "cpp", "cuda", "triton" or "reference"; None for the fastest on the device, see `cnext.ops.dispatch`.

Every op raises `cnext.errors.UserError` where a tensor's dtype, shape, device or strides do not fit, where memory is
shared, and where ``impl`` is unknown or cannot run. The error names the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError, unknown
from cnext.ops.averaging_table import OPS, Guard, adamw_scalars, literal_scalars
from cnext.ops.dispatch import Impl
from cnext.ops.foreach import Prepared

for _op in OPS.values():
    _op.register()


def prepare(op: str, *lists: list[Tensor] | None, impl: Impl | None = None) -> Prepared:
    """An op whose lists of tensors are checked once, to be called at every step with little work on the host.

    Args:
        op: name of an op on lists in `cnext.ops`, such as "pema_step_".
        lists: its lists of tensors, in its order, none of them empty. None: a list that is only read is given per call.
        impl: as the op's.

    Returns:
        A `Prepared`, called with the op's other arguments; its result is the op's.

    Raises:
        UserError: as the op; ``op`` is unknown, or takes another number of lists.

    Example:
        >>> theta, fisher, ema = [torch.ones(2)], [torch.zeros(2)], [torch.zeros(2)]
        >>> step, level = prepare("pema_step_", theta, None, fisher, ema), torch.ones(1, dtype=torch.float64)
        >>> step(level, grad=[torch.ones(2)]).tolist()
        [[2.0, 2.0, 1.0, 0.5]]
        >>> ema[0]
        tensor([0.5000, 0.5000])
    """
    if op not in OPS:
        raise unknown("op", op, list(OPS))
    if op == "adamw_pema_step_" and len(lists) == 6 and lists[4] is None:
        op, lists = "adamw_pema_step_shared_", (*lists[:4], lists[5])
    roles = OPS[op].roles
    if len(lists) != len(roles):
        raise UserError(f"prepare: {op} takes {len(roles)} lists, {', '.join(roles)}; got {len(lists)}")
    return Prepared(OPS[op], dict(zip(roles, lists, strict=True)), impl)


def _call(op: str, lists: tuple[list[Tensor], ...], *rows: Tensor, impl: Impl | None, **scalars: float) -> Any:
    """Runs a registered op; on empty lists it does nothing."""
    if not any(lists):
        return torch.empty((0, OPS[op].columns), dtype=torch.float64)
    return getattr(torch.ops.cnext, op)(*lists, *rows, **scalars, impl=impl)


def fisher_accumulate_(
    fisher: list[Tensor], grad: list[Tensor], *, scale: float = 1.0, impl: Impl | None = None
) -> None:
    """fisher <- fisher + scale grad^2, in place, in one pass.

    Args:
        fisher: float32, written.
        grad: float32, bfloat16 or float16.
        scale: factor of the square.

    Example:
        >>> fisher = [torch.zeros(2)]
        >>> fisher_accumulate_(fisher, [torch.tensor([1.0, 2.0])], scale=0.5)
        >>> fisher[0]
        tensor([0.5000, 2.0000])

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 2.
    """
    _call("fisher_accumulate_", (fisher, grad), scale=scale, impl=impl)


def sums(tensors: list[Tensor], *, impl: Impl | None = None) -> Tensor:
    """The sum of each tensor in float64. Compiled, the same bits for any number of threads.

    Args:
        tensors: float32, of any shapes.

    Returns:
        (tensors,) float64.

    Example:
        >>> sums([torch.ones(2, 3), torch.arange(3.0)]).tolist()
        [6.0, 3.0]
    """
    return _call("sums", (tensors,), impl=impl).view(-1)


def pema_merge_(
    theta: list[Tensor],
    theta_old: list[Tensor],
    fisher_new: list[Tensor],
    fisher_old: list[Tensor],
    *,
    new_scale: float,
    c: float = 5.0,
    damping: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Merges parameters with their values from before a task, weighted by Fisher information; in place, in one pass.

    theta <- beta theta_old + (1 - beta) theta,  beta = mu / (f + mu + damping),  mu = fisher_old / c,
    f = new_scale * fisher_new;  then fisher_old <- fisher_old + f. Where fisher_old is 0, beta is 0 and theta stays.
    beta minimizes f/2 (x - theta)^2 + mu/2 (x - theta_old)^2, the two tasks' losses to second order. A theta that is
    not finite stays so: it is the model itself, not a state.

    Args:
        theta: float32, bfloat16 or float16 parameters after the task, written.
        theta_old: the same before the task.
        fisher_new: float32, the task's Fisher information in any unit.
        fisher_old: float32, the sum over earlier tasks, written.
        new_scale: converts ``fisher_new`` to the unit of ``fisher_old``.
        c: plasticity, positive; larger keeps less of the old.
        damping: lambda of Eq. 3, in the unit of ``fisher_old``.

    Returns:
        (tensors, 5) float64: count, sum, sum of squares, minimum and maximum of beta, per tensor.

    Example:
        >>> theta, fisher_old = [torch.tensor([1.0, 1.0])], [torch.tensor([0.0, 1.0])]
        >>> new = [torch.tensor([1.0, 1.0])]
        >>> rows = pema_merge_(theta, [torch.tensor([3.0, 3.0])], new, fisher_old, new_scale=1.0, c=1.0, damping=0.0)
        >>> theta[0], fisher_old[0], rows.tolist()
        (tensor([1., 2.]), tensor([1., 2.]), [[2.0, 0.5, 0.25, 0.0, 0.5]])

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 3 and 4, with the damping given per parameter.
    """
    lists = (theta, theta_old, fisher_new, fisher_old)
    return _call("pema_merge_", lists, new_scale=new_scale, c=c, damping=damping, impl=impl)


def ema_step_(theta: list[Tensor], ema: list[Tensor], *, beta: float, impl: Impl | None = None) -> None:
    """ema <- beta ema + (1 - beta) theta, in place, in one pass.

    Args:
        theta: float32, bfloat16 or float16.
        ema: float32, bfloat16 or float16, written.
        beta: weight of the old average.

    Example:
        >>> ema = [torch.zeros(2)]
        >>> ema_step_([torch.ones(2)], ema, beta=0.75)
        >>> ema[0]
        tensor([0.2500, 0.2500])
    """
    _call("ema_step_", (theta, ema), beta=beta, impl=impl)


def pema_step_(
    theta: list[Tensor],
    grad: list[Tensor],
    fisher: list[Tensor],
    ema: list[Tensor],
    level: Tensor,
    *,
    decay: float = 1.0,
    scale: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """Fisher accumulation and a moving-average step that it weights, in place, in one pass.

    fisher <- decay fisher + scale grad^2,  beta = level / (fisher + level), 1 where both are 0,
    ema <- beta ema + (1 - beta) theta.

    Args:
        theta, grad: float32, bfloat16 or float16.
        fisher: float32, written.
        ema: float32, bfloat16 or float16, written.
        level: (tensors,) float64 on the same device, at least 0: the damping lambda of each tensor.
        decay: factor of the old ``fisher``.
        scale: factor of the squared gradient.

    Returns:
        (tensors, 4) float64: elements used, sum of the new fisher, sum of beta, sum of beta^2.

    Example:
        >>> fisher, ema, level = [torch.zeros(2)], [torch.zeros(2)], torch.ones(1, dtype=torch.float64)
        >>> pema_step_([torch.ones(2)], [torch.tensor([0.0, 1.0])], fisher, ema, level).tolist()
        [[2.0, 1.0, 1.5, 1.25]]
        >>> ema[0]
        tensor([0.0000, 0.5000])
    """
    return _call("pema_step_", (theta, grad, fisher, ema), level, decay=decay, scale=scale, impl=impl)


def pema_literal_(
    theta: list[Tensor],
    grad: list[Tensor],
    fisher: list[Tensor],
    ema: list[Tensor],
    *,
    decay: float = 0.0,
    scale: float = 1.0,
    damping: float = 1e-5,
    guard: Guard = "fallback",
    fallback: float = 0.99,
    impl: Impl | None = None,
) -> Tensor:
    """A moving-average step by the paper's equation, element by element, in place, in one pass.

    fisher <- decay fisher + scale grad^2,  beta = (grad + 1) / ((theta - ema) fisher + damping),
    ema <- beta ema + (1 - beta) theta. Where beta is not inside (0, 1), guard "fallback" takes the constant
    ``fallback`` instead, and "clamp" the nearer of 0 and 1.

    Args:
        theta, grad: float32, bfloat16 or float16.
        fisher: float32, written.
        ema: float32, bfloat16 or float16, written.
        decay, scale: as `pema_step_`.
        damping: lambda of the equation.
        guard: "fallback" or "clamp".
        fallback: beta of the guard "fallback".

    Returns:
        (tensors, 4) float64: elements used, beta inside (0, 1), beta at or below 0, beta at or above 1.

    Raises:
        UserError: also for an unknown guard.

    Example:
        >>> ema = [torch.zeros(2)]
        >>> grad = [torch.tensor([1.0, -1.0])]
        >>> pema_literal_([torch.ones(2)], grad, [torch.zeros(2)], ema, damping=3.0, fallback=0.75).tolist()
        [[2.0, 1.0, 1.0, 0.0]]
        >>> ema[0]
        tensor([0.5000, 0.2500])

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 4 and its released code.
    """
    _, scalars = literal_scalars(guard=guard, decay=decay, scale=scale, damping=damping, fallback=fallback)
    return _call("pema_literal_", (theta, grad, fisher, ema), **scalars, impl=impl)


def dema_step_(
    theta: list[Tensor],
    grad: list[Tensor],
    ema: list[Tensor],
    grad_prev: list[Tensor],
    *,
    factor: float = 2.0,
    fallback: float = 0.01,
    impl: Impl | None = None,
) -> Tensor:
    """CIA's dynamic moving average, one weight per tensor, in place, in two passes and without synchronizing.

    a = |theta - ema|_1,  b = |grad|_1,  c = |grad - grad_prev|_1,  alpha = factor (1 + b) / (a c), or ``fallback``
    where that is not inside (0, 1);  ema <- (1 - alpha) ema + alpha theta;  grad_prev <- grad. A tensor with a gradient
    that is not finite takes the fallback.

    Args:
        theta, grad: float32, bfloat16 or float16.
        ema: float32, bfloat16 or float16, written.
        grad_prev: the last step's gradient, of the dtype of ``grad``, written.
        factor: of alpha.
        fallback: alpha where the formula leaves (0, 1).

    Returns:
        (tensors, 3) float64: a, b, c.

    Example:
        >>> ema, grad_prev = [torch.zeros(1)], [torch.ones(1)]
        >>> dema_step_([torch.tensor([4.0])], [torch.tensor([3.0])], ema, grad_prev, factor=1.0).tolist()
        [[4.0, 3.0, 2.0]]
        >>> ema[0], grad_prev[0]  # alpha = 1 (1 + 3) / (4 * 2)
        (tensor([2.]), tensor([3.]))

    Reference: Qiao et al., CIA, ICML 2025, as released.
    """
    return _call("dema_step_", (theta, grad, ema, grad_prev), factor=factor, fallback=fallback, impl=impl)


def pema_released_(
    theta: list[Tensor],
    grad: list[Tensor],
    ema: list[Tensor],
    *,
    damping: float = 1e-5,
    fallback: float = 0.99,
    impl: Impl | None = None,
) -> None:
    """A moving-average step by the matrix formula of the released loop, in place. It diverges; for comparison only.

    alpha = (G + 1) (D^T F + damping I)^-1,  D = theta - ema,  F = G o G;  ema <- alpha o ema + (1 - alpha) o theta.
    The sum with damping I and its inverse are float32, everything else is rounded to the dtype of theta, as released:
    in bfloat16 alpha is 99840 nearly everywhere. A singular matrix takes ``fallback``. Plain torch only; allocates two
    q x q matrices.

    Args:
        theta, grad: float32, bfloat16 or float16, (p, q).
        ema: float32, bfloat16 or float16, (p, q), written.
        damping: lambda of the formula.
        fallback: alpha of a singular matrix.

    Raises:
        UserError: also for a tensor that is not two-dimensional.

    Example:
        >>> theta, grad, ema = [torch.ones(1, 1)], [torch.ones(1, 1)], [torch.zeros(1, 1)]
        >>> pema_released_(theta, grad, ema, damping=3.0)
        >>> ema[0].item()  # alpha = 2 / (1 + 3)
        0.5

    Reference: the code released with Continual-NExT, arXiv 2602.18055.
    """
    for i, tensor in enumerate(theta):
        if tensor.ndim != 2:
            raise UserError(f"pema_released_: theta[{i}] has shape {tuple(tensor.shape)}; expected a matrix")
    _call("pema_released_", (theta, grad, ema), damping=damping, fallback=fallback, impl=impl)


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
    impl: Impl | None = None,
) -> Tensor:
    """One step of torch.optim.AdamW, then `pema_step_` on its result; in place, in one pass.

    Args:
        theta, grad: float32, bfloat16 or float16; theta is written.
        exp_avg, exp_avg_sq: float32 moments, written.
        fisher: float32, written; None takes ``exp_avg_sq`` as the Fisher information, and no memory for it.
        ema: float32, bfloat16 or float16, written.
        level: as `pema_step_`.
        step: number of this step, from 1; 0-d tensors on the device for ``step`` and ``lr`` allow CUDA graph capture.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        decay, scale: as `pema_step_`; not used where ``fisher`` is None.

    Returns:
        As `pema_step_`.

    Example:
        >>> theta, grad = [torch.ones(2)], [torch.ones(2)]
        >>> exp_avg, exp_avg_sq, fisher, ema = ([torch.zeros(2)] for _ in range(4))
        >>> level = torch.ones(1, dtype=torch.float64)
        >>> rows = adamw_pema_step_(theta, grad, exp_avg, exp_avg_sq, fisher, ema, level, step=1, lr=0.5)
        >>> theta[0], ema[0]
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.2500]))

    Reference: Loshchilov and Hutter, arXiv 1711.05101.
    """
    rows, scalars = adamw_scalars(level, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if fisher is None:
        lists = (theta, grad, exp_avg, exp_avg_sq, ema)
        return _call("adamw_pema_step_shared_", lists, *rows, **scalars, impl=impl)
    lists = (theta, grad, exp_avg, exp_avg_sq, fisher, ema)
    return _call("adamw_pema_step_", lists, *rows, **scalars, decay=decay, scale=scale, impl=impl)
