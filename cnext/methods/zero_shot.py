"""Zero-shot: the pretrained model as it is. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cnext.backbones.base import Backbone
from cnext.methods.base import Method
from cnext.tasks.base import Task


@dataclass
class ZeroShot(Method):
    """No hyperparameters."""

    def setup(self, backbone: Backbone, generator: torch.Generator) -> None:
        backbone.requires_grad_(False)

    def trainable(self, backbone: Backbone, task: Task) -> dict[str, nn.Parameter]:
        return {}
