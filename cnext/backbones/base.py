"""The interface of a dual-to-dual backbone: image and text in, image and text out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample


@dataclass(frozen=True)
class Loss:
    """total: scalar to differentiate. text: mean cross-entropy per supervised token. image: mean squared error
    of the regressed visual features (0 where the batch writes no image). tokens: supervised tokens and features."""

    total: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor
    tokens: int


class Backbone(ABC, nn.Module):
    """A frozen dual-to-dual model. Adapters are attached to ``language_model`` and nowhere else.

    Subclasses are built with a device and give the five methods below; encoded samples are opaque to everyone else.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    """Name suffixes of the linear layers of ``language_model`` that carry adapters."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder that adapters are attached to."""

    @abstractmethod
    def encode(self, samples: Sequence[Sample]) -> list[Any]:
        """Samples to whatever ``loss`` takes: token ids, labels, visual features. Frozen parts only, no gradient."""

    @abstractmethod
    def loss(self, encoded: Sequence[Any]) -> Loss:
        """The training loss of a batch of encoded samples."""

    @abstractmethod
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        """Greedy answers to each sample's first instruction. Never reads an answer or a target image."""
