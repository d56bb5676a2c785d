"""Distillation: LoRA of rank 32, regularized to predict as it did before the task (Learning without Forgetting).

The teacher is the model at the start of the task. From the second task on, over the batch's supervised positions,

    L = L_task + weight (T^2 KL(softmax(z_teacher / T) || softmax(z / T)) + image_loss_weight MSE(v_teacher, v)),

with z the text logits and v the predicted image features, both as means like those of the task loss. T^2 makes the
gradient's size independent of T. Where the student equals the teacher, the added gradient is zero.

Reference: Li and Hoiem, Learning without Forgetting, arXiv 1606.09282; Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.backbones.base import Output
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.parts.low_rank import LowRank
from cnext.methods.parts.penalties import distillation_loss


@dataclass
class Distillation(LowRank):
    """L = L_task + weight (distillation of text and images from the model before the task)."""

    weight: Annotated[float, "Weight of the distillation loss."] = 0.1
    temperature: Annotated[float, "Temperature T of both distributions over the vocabulary."] = 2.0

    card = Card(
        "arXiv 1606.09282",
        keeps="within a task the parameters that it started from",
        grid={"scale": (1.0, 3.0, 6.0), "weight": (0.1, 0.3, 1.0, 3.0)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"distillation: {name} must be above 0 and finite, got {getattr(self, name)}")
        self.tasks, self.teacher = torch.tensor(0), {}

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.parameters = parameters
        self.teacher = {name: p.detach().clone() for name, p in parameters.items()} if self.tasks else {}

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.teacher:
            return None
        training = self.model.training
        with torch.no_grad(), adapters.holding(self.parameters, self.teacher):
            wanted = self.backbone.eval().output(batch)
        return self.weight * self.distance(wanted, self.backbone.train(training).output(batch))

    def distance(self, teacher: Output, student: Output) -> Tensor:
        """Distillation loss between two outputs for the same batch: a scalar, 0 where they are equal."""
        return distillation_loss(student, teacher, self.backbone.image_loss_weight, self.temperature)

    def after_task(self) -> None:
        self.tasks, self.teacher = self.tasks + 1, {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"tasks": self.tasks, **self.teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tasks, self.teacher = state["tasks"], {name: value for name, value in state.items() if name != "tasks"}
