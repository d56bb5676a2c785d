"""The base class of methods with low-rank branches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Method, check_lr_factor
from cnext.tasks.base import Task


@dataclass
class LowRank(Method):
    """One branch of rank 32, trained on every task.

    A method of this family composes the branches attached, the branches that a task trains, a moving average (``rule``)
    and a penalty (``regularizer``).
    """

    rank: Annotated[int, "Rank of the branch."] = 32
    scale: Annotated[float, "Scaling factor of the branches' output (alpha / rank)."] = 1.0
    dropout: Annotated[float, "Dropout probability on the branches' input during training."] = 0.0
    lr_factor: Annotated[float, "Factor of the recipe's learning rate."] = 1.0
    independent: Annotated[bool, "Draw a dropout mask for each branch, instead of one for all of them."] = False
    init_std: Annotated[
        float, "Standard deviation of A's normal initial values; 0: uniform in +-1/sqrt(width), as in PEFT."
    ] = 0.0

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"rank": (1, 16384)}

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, got {self.rank}")
        adapters.check_ranges({}, self.scale, self.dropout)
        if not 0 <= self.init_std < float("inf"):
            raise UserError(f"init_std must be at least 0 and finite, got {self.init_std}")
        check_lr_factor(self.lr_factor)

    def targets(self) -> Sequence[str]:
        """Name suffixes of the linear layers that carry the branches."""
        return self.backbone.targets

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        """The branches to attach: name to rank."""
        return {"lora": self.rank}

    def trained_branches(self, task: Task) -> Iterable[str]:
        """Names of the branches that a task trains."""
        return ["lora"]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        adapters.attach(
            self.model,
            self.targets(),
            self.branches(tasks),
            scale=self.scale,
            dropout=self.dropout,
            independent=self.independent,
            init_std=self.init_std,
            generator=generator,
        )

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        return adapters.set_trainable(self.model, self.trained_branches(task))
