"""Zero-shot: the pretrained model, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cnext.methods.base import Card, Method
from cnext.tasks.base import Task


@dataclass
class ZeroShot(Method):
    """No hyperparameters."""

    card = Card("arXiv 2602.18055, Table 1")

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.backbone.requires_grad_(False)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        return {}
