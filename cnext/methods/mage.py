"""MAGE: four LoRA branches, and a moving average by the damped inverse of blocks of the Fisher information.

Text and image have a general and an expert branch each, all trained on every task. A is fixed at its random initial
value, as in LoRA-FA: the output is then linear in what is trained, so that an average of parameters is the same average
of the branches' weights B A. The Fisher information of a row of B is a block over the branches side by side; its damped
inverse pulls towards the task's start during training, and merges at the task's end, see `cnext.averaging.PemaKron`.
The paper's form, trained by modality role and with a diagonal Fisher information, is `mage-paper`.

Reference: Continual-NExT, arXiv 2602.18055, section 4; LoRA-FA, arXiv 2308.03303.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from cnext.adapters.attach import MATRIX_A, fix_a, only_b
from cnext.averaging import PemaKron
from cnext.errors import unknown
from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.tasks.base import Task

TRAINS = ("roles", "all")


@dataclass
class Mage(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    scale: float = 12.0
    average: str = "pema-kron"
    trains: Annotated[str, "Branches that a task trains: roles, those of its modalities, or all."] = "all"
    a: Annotated[str, "Matrix A of every branch: trained, or fixed at its random initial value."] = "fixed"
    pull: Annotated[float, "Weight of pema-kron's pull to the task's start, at the largest learning rate; 0: none."] = (
        0.024
    )

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {**RoleBranches.options, "pull": ("pema-kron",)}
    card = Card(
        "own; arXiv 2602.18055, 2308.03303",
        keeps="the averaging rule's state; of pema-kron the factors of the summed Fisher information",
        grid={"scale": (3.0, 6.0, 12.0), "pull": (0.0005, 0.001, 0.002, 0.004)},
        grows={"pull": 1},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains not in TRAINS:
            raise unknown("branches to train", self.trains, TRAINS)
        if self.a not in MATRIX_A:
            raise unknown("value of a", self.a, MATRIX_A)

    def trained_branches(self, task: Task) -> Iterable[str]:
        return super().trained_branches(task) if self.trains == "roles" else self.branches([task])

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        if self.a == "trained":
            return parameters
        self.groups = {branch: only_b(of) for branch, of in self.groups.items()}
        self.observed = only_b(self.observed)
        if isinstance(self.rule, PemaKron):
            self.rule.frozen = self.observed
        return fix_a(parameters)

    def extra_bytes(self, tasks: int) -> int:
        parameters = self.adapter_parameters()
        return self.rule.kept_bytes(parameters if self.a == "trained" else only_b(parameters)) if self.rule else 0
