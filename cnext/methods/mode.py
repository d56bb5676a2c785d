"""MoDE: experts per modality, routed by position; the image side is regularized by distillation.

As published, tokens choose their experts by modality: a softmax mixture of text experts, and one image expert. On a
separate stream of image-generation data the model is distilled, with weight 0.3, from the pretrained model (itself with
the experts off). This implementation differs as follows. The image expert acts where an image is written (published: on
every image token). All targets have experts, of total rank 32. A task that writes text uses and trains the text experts
alone; one that writes an image trains both, because the tokens that start the image are text. There is no separate
stream: batches that write an image are distilled from the pretrained model's outputs p_0, v_0 on the same batch:

    L = L_task + distill (mean over tokens of KL(p_0 || p) + image_loss_weight * MSE(v_0, v))

Reference: Wei, Munir and Marculescu, NeurIPS 2025, arXiv 2512.03125.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters import BranchRole, position_roles
from cnext.adapters.by_position import ByPosition
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.moelora import MoeLora, Router
from cnext.methods.parts.penalties import distillation_loss
from cnext.tasks.base import Task


class ModalityRouter(Router):
    """Softmax over the text experts at positions of text, all weight on the image expert where an image is written."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, in_features) to (batch, length, text experts + 1) that sum to 1."""
        text, image = self.text_and_image(x).split(1, -1)  # pyright: ignore[reportCallIssue]
        return torch.cat([super().forward(x) * text, image], -1)


@dataclass
class Mode(MoeLora):
    """y = W x + scale * (sum over text experts of w_e(x) B_e A_e x, or where an image is written B_image A_image x)."""

    scale: float = 2.0
    lr_factor: float = 1.0
    experts: Annotated[int, "Number of text experts, besides one image expert."] = 3
    distill: Annotated[float, "Weight of the distillation from the pretrained model, for batches with images."] = 0.3

    router = ModalityRouter
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"experts": (1, 256)}
    card = Card("arXiv 2512.03125", grid={"scale": (2.0, 6.0, 12.0), "distill": (0.1, 0.3, 1.0, 3.0)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distill < float("inf"):
            raise UserError(f"distill must be at least 0 and finite, got {self.distill}")

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        return dict.fromkeys([*(f"text-{index}" for index in range(self.experts)), "image"], self.rank)

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        image = [role == BranchRole("image", "expert") for role in position_roles(self.modalities)]
        super().attach(tasks, generator)
        by_position = ByPosition(
            lambda: self.backbone.positions, torch.tensor([[not is_image, is_image] for is_image in image]).float()
        )
        for layer in adapters.layers(self.model).values():
            layer.router.text_and_image = by_position  # pyright: ignore[reportOptionalMemberAccess]

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.writes_image = "image" in task.writes
        parameters = self.adapter_parameters().items()
        return self.unfreeze({name: p for name, p in parameters if self.writes_image or ".image." not in name})

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.writes_image or not self.distill:
            return None
        with torch.no_grad(), adapters.activated(self.model, ()):
            teacher = self.backbone.output(batch)
        student = self.backbone.output(batch)
        return self.distill * distillation_loss(student, teacher, self.backbone.image_loss_weight)
