"""Attention-only LoRA: one branch on the attention projections alone, of the rank that uses the same parameter budget.

A branch of rank r has r (in + out) parameters in a layer. The budget of rank R in all targets, R sum of (in + out) over
them, allows rank floor(R sum over all targets / sum over the attention's) here: 76 in place of 32 on the tiny backbone.
The feed-forward layers, which store more of the knowledge, stay as they were pretrained.

Reference: Hu et al., LoRA, arXiv 2106.09685, section 4.2 (attention weights alone, for the same budget).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cnext.methods.base import Card
from cnext.methods.parts.branches import total_width
from cnext.methods.parts.low_rank import LowRank
from cnext.tasks.base import Task


@dataclass
class AttentionLora(LowRank):
    """y = W x + scale B A x in q_proj, k_proj, v_proj and o_proj."""

    lr_factor: float = 0.25
    rank: Annotated[int, "Rank of a LoRA in all targets, whose parameter count is the budget here."] = 32

    card = Card("arXiv 2106.09685", grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)})

    def targets(self) -> Sequence[str]:
        return ("q_proj", "k_proj", "v_proj", "o_proj")

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        widths = [total_width(self.model, targets) for targets in (self.backbone.targets, self.targets())]
        return {"lora": self.rank * widths[0] // max(widths[1], 1)}
