"""O-LoRA: one branch per task, trained towards being orthogonal to the branches learnt before it.

L = L_task + penalty * sum over layers and tasks i learnt of || A_i A^T ||^2

The rows of A_i span what branch i reads of x; where A A_i^T = 0 the new branch reads nothing of it. B is free. This is
the paper's loss; the released code sums absolute values in place of squares. The branches of all tasks add up.
Orthogonal rows run out: with tasks * rank beyond a layer's width, the penalty only pulls A towards 0.

Reference: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, arXiv 2310.14152.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card, Memory, TaskBranches
from cnext.methods.lora import Lora


@dataclass
class OLora(TaskBranches, Lora):
    """y = W x + scale * sum over the tasks so far of B_i A_i x; rank is that of each branch."""

    penalty: float = 0.05
    """Weight of the orthogonality penalty."""

    card = Card("arXiv 2310.14152", keeps="a branch for every task")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf:
            raise UserError(f"o-lora: expected a finite penalty of at least 0, got {self.penalty}")

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        *learnt, present = self.active
        layers = adapters.layers(self.model).values()
        self.present = [layer.branches[present].A for layer in layers]
        self.learnt = [torch.cat([layer.branches[name].A.detach() for name in learnt]) for layer in layers if learnt]

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.learnt:
            return None
        overlaps = ((a @ b.T).square().sum() for a, b in zip(self.learnt, self.present, strict=True))
        return self.penalty * sum(overlaps, self.learnt[0].new_zeros(()))
