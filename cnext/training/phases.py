"""Run a method's additional training phases and end its task."""

from __future__ import annotations

import math
from typing import Any

import torch

from cnext.errors import UserError
from cnext.methods.base import Method


def finish_task(method: Method) -> dict[str, Any] | None:
    """Trains what `Method.phases` yields, one phase after another. Returns what `Method.after_task` returns.

    Raises: UserError where a phase's loss is not finite.
    """
    for phase in method.phases():
        optimizer = torch.optim.AdamW(phase.parameters, phase.learning_rate, weight_decay=0.0)
        for parameter in phase.parameters:
            parameter.requires_grad_(True)
        for step in range(phase.steps):
            loss = phase.loss(step)
            if not math.isfinite(value := loss.item()):
                raise UserError(f"the loss is {value} in step {step + 1} of {phase.steps} of an additional phase")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return method.after_task()
