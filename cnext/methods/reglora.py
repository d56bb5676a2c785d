"""RegLoRA: one branch per task, with a penalty on the entries where earlier tasks' updates are largest (SEFE).

    L = L_task + penalty * mean over layers of mean over (i, j) in I of |(B A)_ij|

After every task the largest 2% of the entries of |B A| of each layer are added to its I, duplicates included. The
released code merges the branch into W and starts another; here the earlier branches are frozen and add up, which is the
same function.

The released code has penalty 2500, for rank 128 and a learning rate of 2e-4. On the tiny backbone at 1e-3 that makes
the penalty's gradient about six times as large as the task's. The default of 25, chosen on validation items, makes it a
twentieth.

Reference: Chen et al., SEFE: Superficial and Essential Forgetting Eliminator, arXiv 2505.02486.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.branches import TaskBranches


@dataclass
class Reglora(TaskBranches):
    """y = W x + scale * sum over the tasks so far of B_i A_i x."""

    penalty: Annotated[float, "Weight of the penalty."] = 25.0
    share: Annotated[float, "Share of each layer's entries that a task adds to the protected ones."] = 0.02

    card = Card(
        "arXiv 2505.02486",
        keeps="a branch for every task, and the places of the entries protected",
        grid={"scale": (1.0, 3.0, 6.0), "penalty": (2.5, 25.0, 250.0, 2500.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf or not 0 < self.share <= 1:
            got = f"{self.penalty} and {self.share}"
            raise UserError(f"reglora: expected a finite penalty of at least 0 and share in (0, 1], got {got}")
        self.protected: dict[str, Tensor] = {}

    def updates(self) -> Iterable[tuple[str, Tensor]]:
        """Name and flattened B A of every layer, of the current task's branch."""
        for name, layer in adapters.layers(self.model).items():
            branch = layer.branches[self.active[-1]]
            yield name, (branch.B @ branch.A).flatten()

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.protected:
            return None
        means = [update.index_select(0, self.protected[name]).abs().mean() for name, update in self.updates()]
        return self.penalty * torch.stack(means).mean()

    @torch.no_grad()
    def after_task(self) -> dict[str, Any] | None:
        for name, update in self.updates():
            largest = update.abs().topk(max(1, int(self.share * len(update)))).indices.int()
            self.protected[name] = torch.cat([self.protected.get(name, largest[:0]), largest])

    def extra_bytes(self, tasks: int) -> int:
        entries = sum(layer.in_features * layer.out_features for layer in adapters.layers(self.model).values())
        return super().extra_bytes(tasks) + int(4 * tasks * self.share * entries)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.protected

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        device = next(iter(self.adapter_parameters().values())).device
        self.protected = {name: tensor.to(device) for name, tensor in state.items() if name != "active"}
