"""Reference implementations of the averaging ops in plain torch; see `cnext.ops.averaging` for each.

They compute in the state's dtype: with float64 state they are what the kernels are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor]


def fisher_accumulate_(fisher: Tensors, grad: Tensors, *, scale: float) -> None:
    for f, g in zip(fisher, grad, strict=True):
        square = g.to(f.dtype).square().mul_(scale)
        f.add_(square.masked_fill_(~square.isfinite(), 0.0))


def sums(tensors: Tensors) -> Tensor:
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])


def pema_merge_(
    theta: Tensors,
    theta_old: Tensors,
    fisher_new: Tensors,
    fisher_old: Tensors,
    *,
    new_scale: float,
    c: float,
    damping: float,
) -> Tensor:
    rows = []
    for now, old, new, past in zip(theta, theta_old, fisher_new, fisher_old, strict=True):
        f = new * new_scale
        f.masked_fill_(~f.isfinite(), 0.0)
        mu = past / c
        beta = torch.where(mu > 0, mu / (f + mu + damping), 0.0)
        now_, old_ = now.to(past.dtype), old.to(past.dtype)
        now.copy_(now_ + beta * (old_ - now_))
        past.add_(f)
        rows.append(_beta_statistics(beta))
    return torch.stack(rows)


def ema_step_(theta: Tensors, ema: Tensors, *, beta: float) -> None:
    for now, average in zip(theta, ema, strict=True):
        _mix_(average, now, beta, now.isfinite())


def pema_step_(
    theta: Tensors, grad: Tensors, fisher: Tensors, ema: Tensors, level: Tensor, *, decay: float, scale: float
) -> Tensor:
    rows = []
    for t, (now, g, f, average) in enumerate(zip(theta, grad, fisher, ema, strict=True)):
        square = g.to(f.dtype).square().mul_(scale)
        use = square.isfinite() & now.isfinite()
        f.copy_(torch.where(use, f * decay + square, f))
        rows.append(_average_(average, now, f, level[t], use))
    return torch.stack(rows)


def pema_literal_(
    theta: Tensors,
    grad: Tensors,
    fisher: Tensors,
    ema: Tensors,
    *,
    decay: float,
    scale: float,
    damping: float,
    fallback: float,
    clamp: float,
) -> Tensor:
    below, above = (0.0, 1.0) if clamp else (fallback, fallback)
    rows = []
    for now, g, f, average in zip(theta, grad, fisher, ema, strict=True):
        gradient = g.to(f.dtype)
        square = gradient.square().mul_(scale)
        use = square.isfinite() & now.isfinite()
        f.copy_(torch.where(use, f * decay + square, f))
        raw = (gradient + 1.0) / ((now.to(f.dtype) - average.to(f.dtype)) * f + damping)
        inside, low = (raw > 0) & (raw < 1), raw <= 0
        _mix_(average, now, torch.where(inside, raw, torch.where(low, below, above)), use)
        counted = (use, use & inside, use & low, use & ~inside & ~low)
        rows.append(torch.stack([mask.sum(dtype=torch.float64) for mask in counted]))
    return torch.stack(rows)


def dema_step_(
    theta: Tensors, grad: Tensors, ema: Tensors, grad_prev: Tensors, *, factor: float, fallback: float
) -> Tensor:
    rows = []
    for now, g, average, previous in zip(theta, grad, ema, grad_prev, strict=True):
        state = torch.promote_types(average.dtype, torch.float32)
        now_, average_, g_, previous_ = (tensor.to(state) for tensor in (now, average, g, previous))
        norms = torch.stack([x.abs().sum(dtype=torch.float64) for x in (now_ - average_, g_, g_ - previous_)])
        alpha = factor * (1 + norms[1]) / (norms[0] * norms[2])
        beta = 1 - torch.where((alpha > 0) & (alpha < 1), alpha, fallback)
        _mix_(average, now, beta.to(state), now.isfinite())
        previous.copy_(g)
        rows.append(norms)
    return torch.stack(rows)


def adamw_pema_step_(
    theta: Tensors,
    grad: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    fisher: Tensors,
    ema: Tensors,
    rows: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    scale: float,
) -> Tensor:
    out = []
    for t, (now, g, m, v, f, average) in enumerate(zip(theta, grad, exp_avg, exp_avg_sq, fisher, ema, strict=True)):
        gradient = g.to(m.dtype)
        use = (gradient * gradient).isfinite() & now.isfinite()
        _adamw_(now, gradient, m, v, rows[t], (beta1, beta2, eps), use)
        f.copy_(torch.where(use, f * decay + gradient.square() * scale, f))
        out.append(_average_(average, now, f, rows[t, 0], use))
    return torch.stack(out)


def adamw_pema_step_shared_(
    theta: Tensors,
    grad: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    ema: Tensors,
    rows: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    lists = (theta, grad, exp_avg, exp_avg_sq, exp_avg_sq, ema)
    return adamw_pema_step_(*lists, rows, beta1=beta1, beta2=beta2, eps=eps, decay=1.0, scale=0.0)


def pema_released_(theta: Tensors, grad: Tensors, ema: Tensors, *, damping: float, fallback: float) -> None:
    for now, g, average in zip(theta, grad, ema, strict=True):
        old, gradient = average.to(now.dtype), g.to(now.dtype)
        wide = torch.promote_types(now.dtype, torch.float32)
        identity = torch.eye(now.shape[1], dtype=wide, device=now.device)
        inverse, failed = torch.linalg.inv_ex((now - old).mT @ gradient.square() + damping * identity)
        alpha = torch.where(failed != 0, fallback, (gradient + 1) @ inverse.to(now.dtype))
        average.copy_(old * alpha + now * (1 - alpha))


def _mix_(ema: Tensor, theta: Tensor, beta: Tensor | float, use: Tensor) -> None:
    """ema <- theta + beta (ema - theta) where ``use``, in float32 or wider."""
    state = torch.promote_types(ema.dtype, torch.float32)
    now, average = theta.to(state), ema.to(state)
    ema.copy_(torch.where(use, now + beta * (average - now), average))


def _average_(ema: Tensor, theta: Tensor, fisher: Tensor, level: Tensor, use: Tensor) -> Tensor:
    """The averaging of `pema_step_` on an updated fisher; (4,) float64: elements used, sums of fisher, beta, beta^2."""
    level = level.to(fisher.dtype)
    denominator = fisher + level
    beta = torch.where(denominator > 0, level / denominator, 1.0)
    _mix_(ema, theta, beta, use)
    counted = beta.where(use, 0.0).double()
    return torch.stack(
        [use.sum(dtype=torch.float64), fisher.sum(dtype=torch.float64), counted.sum(), counted.square().sum()]
    )


def _adamw_(
    theta: Tensor, grad: Tensor, m: Tensor, v: Tensor, row: Tensor, constants: tuple[float, float, float], use: Tensor
) -> None:
    """One AdamW step where ``use``, with the operations of torch.optim.AdamW in their order."""
    beta1, beta2, eps = constants
    shrink, size, correction = row[1:].tolist()
    average = m.lerp(grad, 1 - beta1)
    square = (v * beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (square.sqrt() / correction).add_(eps)
    moved = (theta.to(m.dtype) * shrink).addcdiv_(average, denominator, value=-size)
    for tensor, value in ((theta, moved), (m, average), (v, square)):
        tensor.copy_(torch.where(use, value, tensor))


def _beta_statistics(beta: Tensor) -> Tensor:
    """(5,) float64: count, sum, sum of squares, minimum and maximum of beta."""
    wide = beta.double()
    if not wide.numel():
        return wide.new_tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf])
    return torch.stack([wide.new_tensor(wide.numel()), wide.sum(), wide.square().sum(), wide.min(), wide.max()])
