"""EW: four branches of equal weight, all trained on every task; a LoRA of rank 32 in four parts.

The first row of the paper's ablation: no router, no frozen branch, no average. The sum of four branches of rank 8 is
one branch of rank 32, so ``--ew.average pema`` is MAGE's merge on a plain LoRA.

Reference: Continual-NExT, arXiv 2602.18055, Table 4 (EW).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches


@dataclass
class Ew(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x, every B_i and A_i trained."""

    scale: float = 6.0
    lr_factor: float = 0.25
    average: Annotated[str, "Averaging rule, see mage."] = "none"

    freeze = False
    card = Card(
        "arXiv 2602.18055, Table 4",
        keeps="nothing; with an average, the rule's state",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )
