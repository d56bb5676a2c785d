"""EW+GA: mage-paper without its average; four branches by modality role, only the task's own trained (4-split LoRA).

General branches are trained on tasks that read their modality, experts on tasks that write it.

Reference: Continual-NExT, arXiv 2602.18055, Table 4 (EW+GA) and section 4 (4-Split LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches


@dataclass
class EwGa(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    scale: float = 6.0
    lr_factor: float = 0.25
    average: Annotated[str, "Averaging rule, see mage."] = "none"

    card = Card(
        "arXiv 2602.18055, Table 4",
        keeps="nothing; with an average, the rule's state",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )
