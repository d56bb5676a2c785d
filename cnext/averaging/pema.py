"""PEMA: parameters are merged with their values from before the task, weighted by Fisher information."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cnext import ops
from cnext.averaging.base import MovingAverage, Statistics, by_kind, mean_and_std
from cnext.averaging.fisher import FisherAccumulator, Unit
from cnext.averaging.hyperparameters import LEAST, MOST, number
from cnext.errors import UserError


class Pema(MovingAverage):
    """At a task's end, per parameter: theta <- beta theta_start + (1 - beta) theta, beta = mu / (F_t + mu + damping).

    mu = F_old / c. F_t is the mean squared gradient over the second half of the task's steps, divided by its mean over
    all parameters of the task, so that tasks whose losses differ in scale weigh the same. F_old is the sum of F_t over
    earlier tasks, by name: beta is 0 where no earlier task trained a parameter, and the first task averages nothing.
    Elements whose squared gradient is not finite are skipped, as of a step that overflows in mixed precision.

    Parameters: float32, bfloat16 or float16, of any shape. Memory: 4 bytes a parameter (F_old), and within a task 4
    more (F_t) and a copy of the parameters (theta_start).

    Args:
        c: plasticity, without unit; larger keeps less of the old, infinity nothing. 2 to 10 is a sensible range.
        damping: lambda of Eq. 3, in units of F_t.
        unit: whose gradients are squared, see `FisherAccumulator`.

    Raises:
        UserError: ``c`` is not positive, ``damping`` is negative or infinite, or the unit is unknown. `end_task`: at
            most half of the task's steps were seen, so that there is no F_t, or F_t is out of float32's range.

    Example:
        >>> import torch
        >>> from cnext.averaging import Pema
        >>> weight, average = torch.nn.Parameter(torch.zeros(1)), Pema(c=1.0, damping=0.0)
        >>> for value in (2.0, 4.0):
        ...     with average.task({"weight": weight}, steps=1):
        ...         weight.grad = torch.ones(1)
        ...         average.update()
        ...         weight.data[:] = value  # in place of an optimizer's step
        >>> weight.item(), average.statistics["weight"]  # beta = 1 / (1 + 1)
        (3.0, (0.5, 0.0))

    Reference: Continual-NExT, arXiv 2602.18055, section 4, with the damping given per parameter.
    """

    name = "pema"
    kept = ("fisher_old",)
    persistent_statistics = 1

    def __init__(self, c: float = 5.0, damping: float = 1e-5, unit: Unit = "step") -> None:
        super().__init__()
        self.c = number("Pema: c", c, LEAST, math.inf)
        self.damping = number("Pema: damping", damping, 0, MOST)
        self.accumulator = FisherAccumulator(unit)
        self.fisher_old: dict[str, Tensor] = {}
        self.fisher_new: dict[str, Tensor] = {}
        self.theta_start: dict[str, Tensor] = {}

    def slots(self) -> dict[str, dict[str, Tensor]]:
        return {"fisher_old": self.fisher_old, "fisher_new": self.fisher_new, "theta_start": self.theta_start}

    def past(self) -> dict[str, Tensor]:
        return self.fisher_old

    def has_gradient(self) -> bool:
        return self.accumulator.has_gradient()

    def start(self) -> None:
        for name, parameter in self.parameters.items():
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            past = self.fisher_old.get(name, zeros)
            if past.shape != parameter.shape:
                raise UserError(f"Pema: {name!r} has shape {tuple(parameter.shape)}; it was {tuple(past.shape)} before")
            self.theta_start[name] = parameter.detach().clone()
            self.fisher_old[name] = past.to(parameter.device) if past is not zeros else zeros.clone()
            self.fisher_new[name] = zeros
        self.accumulator.open(self.parameters, self.fisher_new, self._counts)

    def _counts(self) -> bool:
        return self.step >= self.steps // 2

    def read_gradients(self, losses: Tensor | None) -> None:
        self.accumulator.step(losses)

    def require_steps(self) -> None:
        if self.step <= self.steps // 2:
            raise UserError(
                f"end_task after {self.step} of {self.steps} steps: the Fisher information comes from the second half; "
                "begin the task with the number of its steps, or call abort_task"
            )

    def finish(self) -> Statistics:
        groups = list(by_kind(self.parameters))
        total = sum(float(ops.sums([self.fisher_new[name] for name in names]).sum()) for names in groups)
        size = sum(tensor.numel() for tensor in self.fisher_new.values())
        self.require_range(total, size)
        self.warn_of_zeros(total)
        statistics = {}
        for names in groups:
            operands = (self.parameters, self.theta_start, self.fisher_new, self.fisher_old)
            rows = ops.pema_merge_(
                *([slot[name] for name in names] for slot in operands),
                new_scale=size / total if total > 0 else 0.0,
                c=self.c,
                damping=self.damping,
            )
            statistics |= {name: mean_and_std(row[:3]) for name, row in zip(names, rows.tolist(), strict=True)}
        return {name: statistics[name] for name in self.parameters}

    def reset(self) -> None:
        self.accumulator.close()
        self.fisher_new, self.theta_start = {}, {}
