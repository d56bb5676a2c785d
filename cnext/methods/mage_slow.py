"""MAGE-slow: mage-paper with a smaller learning rate for the general branches, which nearly every task trains.

Derivation. Of the six tasks of the paper all train text-general and five image-general, so these two are overwritten
most often. AdamW divides the gradient by its own magnitude, so scaling the gradient would change nothing. Instead the
step is scaled, theta <- theta_before + slow (theta - theta_before), which equals a learning rate of slow times the
recipe's for these branches, weight decay included. slow = 1 is mage; slow = 0 leaves the general branches at their
initial values, where B = 0, so that they contribute nothing.

Reference: the project's own, after Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.tasks.base import Task


@dataclass
class MageSlow(RoleBranches):
    """MAGE whose general branches take ``slow`` times the optimizer's step."""

    scale: float = 3.0
    slow: Annotated[float, "Factor of the general branches' learning rate, from 0 to 1."] = 0.5

    card = Card(
        "own; arXiv 2602.18055",
        keeps="the averaging rule's state; of pema the summed Fisher information",
        grid={"scale": (1.0, 3.0, 6.0), "slow": (0.1, 0.2, 0.5, 0.8)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.slow <= 1:
            raise UserError(f"slow must be from 0 to 1, got {self.slow}")

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        general = [name for name in self.general_branches if name in self.groups]
        self.general: list[torch.Tensor] = list(adapters.branch_parameters(self.model, general).values())
        return parameters

    def before_step(self, batch: Sequence[Any]) -> None:
        super().before_step(batch)
        self.before = [parameter.detach().clone() for parameter in self.general]

    def after_step(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self.general, self.before, 1 - self.slow)
