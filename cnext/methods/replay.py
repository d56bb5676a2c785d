"""Experience replay: LoRA of rank 32 that goes on training on a few kept samples of every earlier task.

    L = L_task(batch) + weight L_task(memory batch)

The memory batch is as large as the task's and drawn uniformly over all samples kept of earlier tasks, none twice in a
step. The trainer seeds torch's generator anew for every step, so the draws repeat where a run is resumed.

Reference: Chaudhry et al., On Tiny Episodic Memories in Continual Learning, arXiv 1902.10486.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnext.distributed import collectives
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.lora import Lora


@dataclass
class Replay(Lora):
    """L = L_task(batch) + weight L_task(memory batch)."""

    samples: int = 20
    """Training samples kept of every task."""
    weight: float = 1.0
    """Weight of the memory batch's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UserError(f"replay: samples must be at least 1, got {self.samples}; without a memory it is lora")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"replay: weight must be above 0 and finite, got {self.weight}; without it replay is lora")

    @property
    def card(self) -> Card:
        return Card("arXiv 1902.10486", rehearsal=self.samples)

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        *earlier, _present = memory.values()
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
        # Penalties of processes are averaged. One without a sample takes part with one that does not count.
        whole = collectives.all_reduce(*self.backbone.supervised(mine), device=self.backbone.device)
        weight = self.weight * collectives.world_size() if mine else 0.0
        return weight * self.backbone.loss(mine or self.memory[:1], whole).total
