"""Penalties that methods add to the task loss: on the parameters, and on the outputs (distillation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnext.averaging import MovingAverage, Pema
from cnext.backbones.base import Output, image_distance
from cnext.errors import UserError


class QuadraticPenalty(torch.autograd.Function):
    """weight * sum of fisher * (theta - anchor)^2 over lists of tensors; a pass over them all at once each way."""

    @staticmethod
    def forward(ctx: Any, weight: float, fisher: list[Tensor], anchor: list[Tensor], *theta: Tensor) -> Tensor:
        """Args: the lists and theta in one order and of the same shapes. Returns: a scalar."""
        moved = torch._foreach_sub(theta, anchor)
        ctx.gradients = torch._foreach_mul(fisher, moved)
        parts = ((one * other).sum() for one, other in zip(moved, ctx.gradients, strict=True))
        value = weight * sum(parts, moved[0].new_zeros(()))
        torch._foreach_mul_(ctx.gradients, 2 * weight)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *torch._foreach_mul(ctx.gradients, gradient)


class FisherPenalty:
    """weight * sum over parameters of F_old (theta - theta_start)^2, within a task of a `Pema`.

    F_old is the Fisher information summed over earlier tasks, with mean 1 per task; theta_start is where the current
    task started. The gradient is 2 weight F_old (theta - theta_start), and 0 in the first task.

    Args:
        rule: the moving average that holds F_old and theta_start.
        weight: finite, at least 0.
    """

    def __init__(self, rule: Pema, weight: float) -> None:
        self.rule, self.weight = rule, weight

    def __call__(self) -> Tensor:
        theta = self.rule.parameters
        fisher, start = ([slot[name] for name in theta] for slot in (self.rule.fisher_old, self.rule.theta_start))
        return QuadraticPenalty.apply(self.weight, fisher, start, *theta.values())


def pull_to_start(rule: MovingAverage | None, pull: float) -> FisherPenalty | None:
    """pull / 2 * sum of F_old (theta - theta_start)^2, whose gradient is pull F_old (theta - theta_start).

    Returns:
        The penalty; None where pull is 0.

    Raises:
        UserError: pull is negative or not finite, or the rule keeps no Fisher information.
    """
    if not 0 <= pull < float("inf"):
        raise UserError(f"pull must be at least 0 and finite, got {pull}")
    if not pull:
        return None
    if not isinstance(rule, Pema):
        got = rule.name if rule else "no rule"
        raise UserError(f"a pull needs the Fisher information of the averaging rule pema, got {got}; set pull to 0")
    return FisherPenalty(rule, pull / 2)


def distillation_loss(student: Output, teacher: Output, image_weight: float, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(z_teacher / T) || softmax(z / T)) + image_weight * distance of the predicted images, a scalar.

    A mean over supervised tokens, 0 without any, and over images as in `image_distance`; T^2 makes the gradient's size
    independent of T. 0, with gradient 0, where the outputs are equal.
    """
    if not len(student.labels):
        return image_weight * image_distance(student, teacher)
    wanted, given = (F.log_softmax(output.logits / temperature, -1) for output in (teacher, student))
    text = temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return text + image_weight * image_distance(student, teacher)
