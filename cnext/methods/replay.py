"""Experience replay: LoRA of rank 32, also trained on a few kept samples of every earlier task.

    L = L_task(batch) + weight L_task(memory batch)

The memory batch is as large as the task's and drawn uniformly, without replacement, from all samples kept of earlier
tasks. The trainer seeds torch's generator at every step, so a resumed run draws the same samples.

Reference: Chaudhry et al., On Tiny Episodic Memories in Continual Learning, arXiv 1902.10486.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cnext.distributed import collectives
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.parts.low_rank import LowRank


@dataclass
class Replay(LowRank):
    """L = L_task(batch) + weight L_task(memory batch)."""

    scale: float = 3.0
    samples: Annotated[int, "Training samples kept of every task."] = 20
    weight: Annotated[float, "Weight of the memory batch's loss."] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UserError(f"replay: samples must be at least 1, got {self.samples}; without a memory, use lora")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"replay: weight must be above 0 and finite, got {self.weight}; with weight 0, use lora")

    @property
    def card(self) -> Card:
        return Card(
            "arXiv 1902.10486", rehearsal=self.samples, grid={"scale": (1.0, 3.0, 6.0), "weight": (0.3, 1.0, 3.0, 10.0)}
        )

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        *earlier, _current = memory.values()
        self.memory = self.backbone.encode([sample for kept in earlier for sample in kept])

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.memory:
            return None
        drawn = collectives.broadcast_object(
            torch.randperm(len(self.memory))[: len(batch) * collectives.world_size()].tolist()
        )
        mine = [self.memory[index] for index in collectives.shard(drawn)]
        if collectives.world_size() == 1:
            return self.weight * self.backbone.loss(mine).total
        # The trainer averages penalties over processes. A process without a sample contributes one of weight 0.
        whole = collectives.all_reduce(*self.backbone.supervised(mine), device=self.backbone.device)
        weight = self.weight * collectives.world_size() if mine else 0.0
        return weight * self.backbone.loss(mine or self.memory[:1], whole).total
