"""O-LoRA: one branch per task, trained to be orthogonal to the branches of earlier tasks.

    L = L_task + penalty * sum over layers and earlier tasks i of || A_i A^T ||^2

The rows of A_i span what branch i reads of x; where A A_i^T = 0 the new branch reads none of it. B is unconstrained.
This is the paper's loss; the released code sums absolute values instead of squares. The branches of all tasks add up.
The number of orthogonal rows is limited: with tasks * rank above a layer's width, the penalty only shrinks A.

Reference: Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, arXiv 2310.14152.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.parts.branches import TaskBranches


@dataclass
class OLora(TaskBranches):
    """y = W x + scale * sum over the tasks so far of B_i A_i x."""

    scale: float = 3.0
    penalty: Annotated[float, "Weight of the orthogonality penalty."] = 5.0

    card = Card(
        "arXiv 2310.14152",
        keeps="a branch for every task",
        grid={"scale": (1.0, 3.0, 6.0), "penalty": (0.005, 0.05, 0.5, 5.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf:
            raise UserError(f"o-lora: expected a finite penalty of at least 0, got {self.penalty}")

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        *earlier, current = self.active
        layers = adapters.layers(self.model).values()
        self.current = [layer.branches[current].A for layer in layers]
        self.earlier = [torch.cat([layer.branches[name].A.detach() for name in earlier]) for layer in layers if earlier]

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.earlier:
            return None
        overlaps = ((a @ b.T).square().sum() for a, b in zip(self.earlier, self.current, strict=True))
        return self.penalty * sum(overlaps, self.earlier[0].new_zeros(()))
