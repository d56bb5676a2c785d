"""OSF: fine-tuning of the weights themselves, in the low singular directions that no task has needed so far.

    W = U_high S_high V_high + U_low S_low V_low,        y = W x

The high part is frozen; U_low, S_low and V_low are trained, from the values that the decomposition gives them. The
gradients G_U and G_V are projected, and then the step itself, so that neither U_low nor V_low moves along a direction
of the high part:

    G_U <- (I - U_high U_high^T) G_U        G_V <- G_V (I - V_high^T V_high)

After a task the weight is what it has become, and is decomposed anew: what the task has learnt with large singular
values is then part of the high directions. The number of low directions shrinks from task to task.

From PEFT (whose default trains half of the directions of a weight): the decomposition, the projected gradients, the
schedule, in which task i of n trains a share of 1 - (i - 1) / n of its capacity. Decided here: the capacity is the
``rank`` that makes as many parameters as LoRA of rank 32 has; the step is projected as well, because Adam rescales the
projected gradient element by element, out of the subspace; ``freeze`` scales the schedule; and W itself is kept as it
was, with the changes of earlier tasks beside it, so that the pretrained model can be had again.

Reference: Nayak et al., Sculpting Subspaces, arXiv 2504.07097; PEFT, tuners/osf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.adapters.osf import attach_osf
from cnext.errors import UserError
from cnext.methods.base import Card, Memory, Method, check_lr_factor
from cnext.methods.parts.branches import total_width
from cnext.tasks.base import Task

PARTS = ("U", "S", "V")


@dataclass
class Osf(Method):
    """y = (W + D) x + (U S V - U_0 S_0 V_0) x, with D the change by earlier tasks."""

    rank: Annotated[int, "Low singular directions of every weight that the first task trains."] = 32
    freeze: Annotated[float, "Share of these directions that is frozen step by step over the tasks, but 1 / tasks."] = (
        0.0
    )
    lr_factor: Annotated[float, "Factor of the recipe's learning rate."] = 2.0

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"rank": (1, 16384)}
    card = Card(
        "arXiv 2504.07097",
        keeps="the change of every weight; within a task also the weights' high directions",
        grid={"freeze": (0.0, 0.5, 1.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.freeze <= 1:
            raise UserError(f"osf: expected rank of at least 1 and freeze from 0 to 1, got {self.rank}, {self.freeze}")
        check_lr_factor(self.lr_factor)
        self.learnt, self.split = 0, False

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.count = max(len(tasks), 1)
        self.budget = 32 * total_width(self.model, self.backbone.targets)
        self.layers = attach_osf(self.model, self.backbone.targets, self.rank)

    @property
    def live(self) -> int:
        """Low directions that the task to come trains: rank (1 - freeze (i - 1) / n), at least one."""
        return max(1, round(self.rank * (1 - self.freeze * min(self.learnt, self.count - 1) / self.count)))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.low.{part}": getattr(layer, part) for name, layer in self.layers.items() for part in PARTS}

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.model.requires_grad_(False)
        return self.adapter_parameters()

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.before: dict[str, list[Tensor]] = {}
        if not self.split:  # now, as a run may start from other weights than those that were there when it attached
            for layer in self.layers.values():
                layer.split(self.live, restart=not layer.U.any())  # a resumed run has them
        self.split = True

    @torch.no_grad()
    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, layer in self.layers.items():
            low: list[Any] = [layer.U, layer.S, layer.V]
            for parameter, gradient in zip(low, layer.project(*(p.grad for p in low)), strict=True):
                parameter.grad = gradient
            self.before[name] = [parameter.detach().clone() for parameter in low]

    @torch.no_grad()
    def after_step(self) -> None:
        for name, layer in self.layers.items():
            low, before = [layer.U, layer.S, layer.V], self.before[name]
            moved = layer.project(*(p - old for p, old in zip(low, before, strict=True)))
            for parameter, old, change in zip(low, before, moved, strict=True):
                parameter.copy_(old + change)

    def after_task(self) -> dict[str, Any] | None:
        self.learnt += 1
        for layer in self.layers.values():
            layer.merge(self.live)

    def extra_bytes(self, tasks: int) -> int:
        """The changes D, and the parameters beyond those of LoRA of rank 32."""
        beyond = sum(p.numel() for p in self.adapter_parameters().values()) - self.budget
        weights = sum(layer.U.shape[0] * layer.V.shape[1] for layer in self.layers.values())
        return 4 * (weights * (tasks > 0) + max(beyond, 0))

    def state_dict(self) -> dict[str, Tensor]:
        merged = {f"merged.{name}": layer.merged for name, layer in self.layers.items() if layer.merged is not None}
        return {"learnt": torch.tensor(self.learnt)} | merged

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """U, S and V keep the values of the checkpoint; what they started from follows from W and D."""
        self.learnt = int(state["learnt"])
        for name, layer in self.layers.items():
            merged = state.get(f"merged.{name}")
            layer.merged = None if merged is None else merged.to(layer.U.device)
            layer.split(self.live, restart=False)
        self.split = True
