"""MAGE: four branches by modality role, only the task's own trained, and a Fisher-weighted moving average.

Text and image have a general branch each (trained on tasks that read the modality) and an expert branch each (trained
on tasks that write it). At the end of a task every trained parameter is averaged with its value from before the task,
see `cnext.averaging.Pema`.

Reference: Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from cnext.errors import unknown
from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.tasks.base import Task

TRAINS = ("roles", "all")


@dataclass
class Mage(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    trains: Annotated[str, "Branches that a task trains: roles, those of its modalities, or all."] = "roles"
    pull: Annotated[float, "Weight of pema-kron's pull towards the task's start in every step; 0: none."] = 0.01

    options: ClassVar[Mapping[str, tuple[str, ...]]] = {**RoleBranches.options, "pull": ("pema-kron",)}
    card = Card(
        "arXiv 2602.18055",
        keeps="the averaging rule's state; of pema the summed Fisher information",
        grid={"scale": (1.0, 3.0, 6.0), "c": (2.0, 5.0, 10.0, 20.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains not in TRAINS:
            raise unknown("branches to train", self.trains, TRAINS)

    def trained_branches(self, task: Task) -> Iterable[str]:
        return super().trained_branches(task) if self.trains == "roles" else self.branches([task])
