"""MoDE: modality-decoupled experts routed by position, the image side held near the pretrained model by distillation.

As published, tokens choose their experts by modality: a softmax mixture of text experts, one image expert; and on a
stream of image generation the model is distilled, at weight 0.3, from itself with the experts off, the pretrained one.
Ours differ in this: the image expert acts where an image is written (published: on every image token); all targets have
the experts, of rank 32 in total. A task that writes text runs through the text experts alone, and trains these; one
that writes an image trains both, for the decision to draw is text. There is no foreign stream, so batches that write an
image are distilled, with 0 for the pretrained model's outputs on the same batch:

    L = task loss + distill (mean over tokens of KL(p_0 || p) + weight of images * mean squared (drawn - drawn_0)).

Reference: Wei, Munir and Marculescu, NeurIPS 2025, arXiv 2512.03125.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import adapters
from cnext.adapters import BRANCH_ROLES, BranchRole
from cnext.adapters.by_position import ByPosition
from cnext.backbones.base import image_distance
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.moelora import MoeLora, Router
from cnext.tasks.base import Task


class ModalityRouter(Router):
    """Softmax over the text experts where ``text_and_image`` says text, all weight on the image expert where image."""

    def forward(self, x: Tensor) -> Tensor:
        text, image = self.text_and_image(x).split(1, -1)  # pyright: ignore[reportCallIssue]
        return torch.cat([super().forward(x) * text, image], -1)


@dataclass
class Mode(MoeLora):
    """y = W x + scale * (sum over text experts of w_e(x) B_e A_e x, or where an image is written B_image A_image x)."""

    experts: int = 3
    """Number of text experts; the image expert comes on top."""
    distill: float = 0.3
    """Weight of the distillation from the pretrained model, on batches that write an image."""

    card = Card("arXiv 2512.03125")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distill < float("inf"):
            raise UserError(f"distill must be at least 0 and finite, got {self.distill}")

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        names = [*(f"text-{index}" for index in range(self.experts)), "image"]
        self.attach_branches(dict.fromkeys(names, self.rank), generator)
        image = torch.tensor([role == BranchRole("image", "expert") for role in BRANCH_ROLES]).float()
        by_position = ByPosition(lambda: self.backbone.positions, torch.stack([1 - image, image], 1))
        for layer in adapters.layers(self.model).values():
            layer.router = router = ModalityRouter(self.experts, layer, generator)
            router.text_and_image = by_position  # pyright: ignore[reportArgumentType]

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.writes_image = "image" in task.writes
        return self.unfreeze({k: p for k, p in self.held().items() if self.writes_image or ".image." not in k})

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.writes_image or not self.distill:
            return None
        with torch.no_grad(), adapters.activated(self.model, ()):
            teacher = self.backbone.output(batch)
        student = self.backbone.output(batch)
        given, wanted = (output.logits.log_softmax(-1) for output in (student, teacher))
        text = F.kl_div(given, wanted, log_target=True, reduction="batchmean")
        return self.distill * (text + self.backbone.image_loss_weight * image_distance(student, teacher))
