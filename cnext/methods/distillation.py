"""Distillation: LoRA of rank 32 that keeps answering the new task's questions as it did before it (LwF).

The teacher is the model as the task found it. From the second task on, over the batch's supervised positions,

    L = L_task + weight (T^2 KL(softmax(z_teacher / T) || softmax(z / T)) + image_loss_weight MSE(v_teacher, v)),

z the logits of the text and v the features drawn of a picture, both means as in the task loss. T^2 keeps the gradient's
size, which is proportional to 1 / T^2. Where the student is the teacher, the added gradient is zero.

Reference: Li and Hoiem, Learning without Forgetting, arXiv 1606.09282; Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import adapters
from cnext.backbones.base import Output, image_distance
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.lora import Lora


@dataclass
class Distillation(Lora):
    """L = L_task + weight (distillation of text and pictures from the model before the task)."""

    weight: float = 0.3
    """Weight of the distillation beside the task loss."""
    temperature: float = 2.0
    """Softens both distributions over the vocabulary."""

    card = Card("arXiv 1606.09282", keeps="within a task the parameters that it started from")

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
        """How far a student's output is from a teacher's on the same batch: a scalar, 0 where they are the same."""
        wanted, given = (F.log_softmax(output.logits / self.temperature, -1) for output in (teacher, student))
        text = self.temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return text + self.backbone.image_loss_weight * image_distance(student, teacher)

    def after_task(self) -> None:
        self.tasks, self.teacher = self.tasks + 1, {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"tasks": self.tasks, **self.teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tasks, self.teacher = state["tasks"], {name: value for name, value in state.items() if name != "tasks"}
