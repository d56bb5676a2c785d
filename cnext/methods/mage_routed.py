"""MAGE-routed: MAGE whose branches take part where their role is played, and not elsewhere in the forward pass.

A frozen branch of MAGE still adds to every output. Here a position of the forward pass belongs to one role: text that
is read goes through text-general, an image that is read through image-general, positions that write text through
text-expert, those that write an image through image-expert. A text task never runs through the image expert, so what an
image task makes of it leaves text answers as they were. No task identity is needed: what a position is for follows from
the tokens before it. The price is capacity, for each position has the rank of one branch. Which branches a task trains,
and the average, are as in mage; ``pull`` adds that of mage-pull.

Reference: the project's own, after Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cnext import adapters
from cnext.adapters import BRANCH_ROLES
from cnext.adapters.by_position import ByPosition
from cnext.methods.base import Card
from cnext.methods.mage_pull import MagePull
from cnext.tasks.base import Task


@dataclass
class MageRouted(MagePull):
    """y = W x + scale * B_r A_r x, r the role of the position of x."""

    pull: float = 0.0
    """Strength of a pull to the task's start, as of mage-pull."""
    c: float = 5.0
    """Plasticity of the merge, as of mage."""

    card = Card("own; arXiv 2602.18055", keeps="the averaging rule's state; of pema the summed Fisher information")

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        router = ByPosition(lambda: self.backbone.positions, torch.eye(len(BRANCH_ROLES)))
        for layer in adapters.layers(self.model).values():
            layer.router = router
