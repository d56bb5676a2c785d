"""2-split LoRA: two branches of rank 16 by input modality; a task trains those of the modalities that it reads.

What a task writes has no influence. The paper compares it with four branches to motivate MAGE's experts.

Reference: Continual-NExT, arXiv 2602.18055, section 4 (2-Split LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches


@dataclass
class TwoSplit(RoleBranches):
    """y = W x + scale * (B_text A_text + B_image A_image) x."""

    scale: float = 3.0
    lr_factor: float = 0.5
    rank: Annotated[int, "Rank of each branch."] = 16
    average: Annotated[str, "Averaging rule, see mage."] = "none"

    sides = ("general",)
    card = Card(
        "arXiv 2602.18055, section 4",
        keeps="nothing; with an average, the rule's state",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )
