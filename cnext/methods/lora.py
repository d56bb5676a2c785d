"""LoRA: one low-rank branch of rank 32, trained on every task in turn (sequential fine-tuning).

Reference: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cnext import adapters
from cnext.backbones.base import Backbone
from cnext.methods.base import Method
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

    def setup(self, backbone: Backbone, generator: torch.Generator) -> None:
        adapters.attach(
            backbone.language_model,
            backbone.targets,
            {"lora": self.rank},
            scale=self.scale,
            dropout=self.dropout,
            generator=generator,
        )

    def trainable(self, backbone: Backbone, task: Task) -> dict[str, nn.Parameter]:
        return adapters.set_trainable(backbone.language_model, ["lora"])
