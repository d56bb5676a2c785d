"""MAGE-routed: mage-paper with hard routing: each position of the forward pass uses the branch of its role only.

A frozen branch of MAGE still adds to every output. Here text that is read goes through text-general, an image that is
read through image-general, positions that write text through text-expert, and positions that write an image through
image-expert. A text task never runs through the image expert, so image tasks that change this expert leave text answers
as they were. No task identity is needed: the role of a position follows from the tokens before it. The price is
capacity: each position has the rank of one branch. Which branches a task trains, and the average, are as in mage;
``pull`` adds the penalty of mage-pull.

Reference: the project's own, after Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from cnext import adapters
from cnext.adapters import position_roles
from cnext.adapters.by_position import ByPosition
from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.methods.parts.penalties import pull_to_start
from cnext.tasks.base import Task


@dataclass
class MageRouted(RoleBranches):
    """y = W x + scale * B_r A_r x, r the role of the position of x."""

    scale: float = 6.0
    c: float = 2.0
    pull: Annotated[float, "Weight of a penalty towards the task's start, see mage-pull."] = 0.0

    card = Card(
        "own; arXiv 2602.18055",
        keeps="the averaging rule's state; of pema the summed Fisher information",
        grid={"scale": (1.0, 3.0, 6.0), "c": (2.0, 5.0, 10.0, 20.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularizer = pull_to_start(self.rule, self.pull)

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        router = ByPosition(lambda: self.backbone.positions, torch.eye(len(position_roles(self.modalities))))
        for layer in adapters.layers(self.model).values():
            layer.router = router
