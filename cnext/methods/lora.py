"""LoRA: one low-rank branch of rank 32, trained on every task in turn (sequential fine-tuning).

Reference: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card, Method
from cnext.tasks.base import Task


@dataclass
class Lora(Method):
    """y = W x + scale B A x."""

    rank: int = 32
    """Rank of the branch."""
    scale: float = 1.0
    """Factor of the branch (alpha / rank)."""
    dropout: float = 0.0
    """Dropout on the branch's input while training."""

    card = Card("arXiv 2106.09685")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        adapters.check_ranges({}, self.scale, self.dropout)

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.attach_branches({"lora": self.rank}, generator)

    def attach_branches(self, ranks: dict[str, int], generator: torch.Generator) -> None:
        """Attaches branches of these names and ranks to the backbone's targets, with the method's scale and dropout."""
        options = {"scale": self.scale, "dropout": self.dropout, "generator": generator}
        adapters.attach(self.model, self.backbone.targets, ranks, **options)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        return adapters.set_trainable(self.model, ["lora"])
