"""MAGE: four branches by modality role, only the task's own trained, and a Fisher-weighted moving average.

Text and image have a general branch each (trained where the modality is read) and an expert branch each (trained where
it is written). At the end of a task every parameter is averaged with its value from before (cnext.averaging.pema).

Reference: Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnext import adapters
from cnext.adapters import BRANCH_ROLES, roles_of
from cnext.averaging import RULES
from cnext.averaging.pooling import pooled
from cnext.errors import UserError, unknown
from cnext.methods.base import Averaged, Card
from cnext.methods.lora import Lora
from cnext.tasks.base import Task


@dataclass
class Mage(Averaged, Lora):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    rank: int = 8
    """Rank of each branch."""
    average: str = "pema"
    """Averaging rule: pema, pema-step, pema-literal, pema-released (diverges, as released), dema, constant or none."""
    c: float = 5.0
    """Plasticity of pema: how much a new task's Fisher information counts against that of the tasks before it."""

    card = Card("arXiv 2602.18055", keeps="the averaging rule's state; of pema the summed Fisher information")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in RULES:
            raise unknown("averaging rule", self.average, list(RULES))
        if not self.c > 0:
            raise UserError(f"expected c > 0, got c={self.c}")
        if self.average != "pema" and self.c != type(self).c:
            raise UserError(f"c={self.c} is of the average pema, and means nothing to {self.average}; leave it out")
        self.rule = RULES[self.average](**({"c": self.c} if self.average == "pema" else {}))

    def roles(self, task: Task) -> list[str]:
        """The branches that a task trains."""
        return [role.name for role in roles_of(task.reads, task.writes)]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.attach_branches({role.name: self.rank for role in BRANCH_ROLES}, generator)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        names = self.roles(task)
        self.groups = {name: adapters.branch_parameters(self.model, [name]) for name in names}
        return adapters.set_trainable(self.model, names)

    def after_task(self) -> dict[str, Any] | None:
        """Mean and standard deviation of beta, the weight of the old, over each branch's parameters."""
        betas = self.rule.end_task()
        return {branch: pooled(betas, group) for branch, group in self.groups.items()} if betas else None

    def extra_bytes(self, tasks: int) -> int:
        """One statistic of every parameter; the other rules begin anew with every task."""
        return sum(4 * parameter.numel() for parameter in self.held().values()) if self.average == "pema" else 0
