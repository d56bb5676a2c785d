"""Attention-only LoRA: one branch on the attention's projections alone, of whatever rank the same parameters pay for.

A branch of rank r costs r (in + out) in a layer, so the budget of rank R in all targets, R sum of (in + out) over them,
buys floor(R sum over targets / sum over the attention's) here: rank 76 in place of 32 on the tiny backbone. The
feed-forward layers, which store more of what was learnt, stay as they were pretrained.

Reference: Hu et al., LoRA, arXiv 2106.09685, section 4.2 (attention weights alone, for the same budget).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.lora import Lora
from cnext.tasks.base import Task


@dataclass
class AttentionLora(Lora):
    """y = W x + scale B A x in q_proj, k_proj, v_proj and o_proj."""

    rank: int = 32
    """Rank of a LoRA in all targets, whose parameters are the budget here."""

    targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    card = Card("arXiv 2106.09685")

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        options = {"scale": self.scale, "dropout": self.dropout, "generator": generator}
        rank = self.rank * self._width(self.backbone.targets) // max(self._width(self.targets), 1)
        adapters.attach(self.model, self.targets, {"lora": rank}, **options)

    def _width(self, targets: Sequence[str]) -> int:
        """Sum of in + out features over the linear layers of these names."""
        named = self.model.named_modules()
        found = [m for name, m in named if isinstance(m, nn.Linear) and name.rpartition(".")[2] in targets]
        return sum(module.in_features + module.out_features for module in found)
