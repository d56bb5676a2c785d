"""2-split LoRA: two branches of rank 16 by input modality, those of the modalities that a task reads trained.

What a task writes decides nothing: the comparison by which the paper motivates MAGE's experts.

Reference: Continual-NExT, arXiv 2602.18055, section 4 (2-Split LoRA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cnext.adapters import BRANCH_ROLES, roles_of
from cnext.methods.base import Card
from cnext.methods.mage import Mage
from cnext.tasks.base import Task


@dataclass
class TwoSplit(Mage):
    """y = W x + scale * (B_text A_text + B_image A_image) x."""

    rank: int = 16
    """Rank of each branch."""
    average: str = "none"
    """Averaging rule, as of mage."""

    card = Card("arXiv 2602.18055, section 4", keeps="nothing; with an average, the rule's state")

    def roles(self, task: Task) -> list[str]:
        return [role.name for role in roles_of(task.reads, ())]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.attach_branches({role.name: self.rank for role in BRANCH_ROLES if role.side == "general"}, generator)
