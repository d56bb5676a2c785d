"""EWC: LoRA, held to where the last task ended in proportion to the summed Fisher information.

L = L_task + penalty * sum over parameters of F (theta - theta_old)^2, with the gradient 2 penalty F (theta - theta_old)

F is the sum over the tasks learnt of F_t, the mean squared gradient of the task's own loss over the second half of its
steps, divided by its mean over the parameters; theta_old is where the last task ended. Both are the bookkeeping of
`cnext.averaging.Pema`, whose merge leaves the parameters as they are where c is infinite. The paper takes F_t at the
end of training and one anchor for every task; with the sum and the latest anchor memory does not grow. The public
implementation for this benchmark reads the parameters' data in the penalty, which therefore has no gradient at all.

Reference: Kirkpatrick et al., arXiv 1612.00796; for the running sum, Schwarz et al., arXiv 1805.06370.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnext.averaging import Pema
from cnext.errors import UserError
from cnext.methods.base import Averaged, Card
from cnext.methods.lora import Lora


class QuadraticPenalty(torch.autograd.Function):
    """factor * sum of fisher * (theta - anchor)^2 over lists of tensors; a pass over them all at once each way."""

    @staticmethod
    def forward(ctx: Any, factor: float, fisher: list[Tensor], anchor: list[Tensor], *theta: Tensor) -> Tensor:
        """Args: the lists and theta in one order and of the same shapes. Returns: a scalar."""
        moved = torch._foreach_sub(theta, anchor)
        ctx.pull = torch._foreach_mul(fisher, moved)
        parts = ((one * other).sum() for one, other in zip(moved, ctx.pull, strict=True))
        value = factor * sum(parts, moved[0].new_zeros(()))
        torch._foreach_mul_(ctx.pull, 2 * factor)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *torch._foreach_mul(ctx.pull, gradient)


@dataclass
class Ewc(Averaged, Lora):
    """y = W x + scale B A x."""

    penalty: float = 0.01
    """Weight of the quadratic penalty. F has mean 1 per task, so it says the same for losses of any size."""

    card = Card("arXiv 1612.00796", keeps="the summed Fisher information of the parameters")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf:
            raise UserError(f"ewc: expected a finite penalty of at least 0, got {self.penalty}")
        self.rule: Pema = Pema(c=math.inf)

    def extra_loss(self, batch: Sequence[Any]) -> Tensor:
        theta = self.rule.parameters
        fisher, anchor = ([slot[name] for name in theta] for slot in (self.rule.fisher_old, self.rule.theta_start))
        return QuadraticPenalty.apply(self.penalty, fisher, anchor, *theta.values())

    def extra_bytes(self, tasks: int) -> int:
        return sum(4 * parameter.numel() for parameter in self.held().values())
