"""Every op in plain torch: the ground truth. Computes in the state's dtype, so float64 state makes it the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_accumulate_(fisher: list[Tensor], grad: list[Tensor], *, scale: float = 1.0) -> None:
    """See `cnext.ops.fisher_accumulate_`."""
    for f, g in zip(fisher, grad, strict=True):
        square = g.to(f.dtype).square().mul_(scale)
        f.add_(square.masked_fill_(~square.isfinite(), 0.0))


def sums(tensors: list[Tensor]) -> Tensor:
    """See `cnext.ops.sums`."""
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors])


def pema_merge_(
    theta: list[Tensor],
    theta_old: list[Tensor],
    fisher_new: list[Tensor],
    fisher_old: list[Tensor],
    *,
    new_scale: float,
    c: float = 5.0,
    damping: float = 1e-5,
) -> Tensor:
    """See `cnext.ops.pema_merge_`."""
    rows = []
    for now, old, new, past in zip(theta, theta_old, fisher_new, fisher_old, strict=True):
        f = new * new_scale
        f.masked_fill_(~f.isfinite(), 0.0)
        mu = past / c
        beta = torch.where(mu > 0, mu / (f + mu + damping), 0.0)
        now_, old_ = now.to(past.dtype), old.to(past.dtype)
        now.copy_(now_ + beta * (old_ - now_))
        past.add_(f)
        rows.append(_spread(beta))
    return torch.stack(rows)


def _spread(beta: Tensor) -> Tensor:
    """(5,) float64: number, sum, sum of squares, least and most of beta."""
    wide = beta.double()
    if not wide.numel():
        return wide.new_tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf])
    return torch.stack([wide.new_tensor(wide.numel()), wide.sum(), wide.square().sum(), wide.min(), wide.max()])
