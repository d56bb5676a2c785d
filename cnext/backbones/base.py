"""The interface of a dual-to-dual backbone: image and text in, image and text out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample


@dataclass(frozen=True)
class Output:
    """What a batch's supervised positions give, and what they should.

    logits: (N, vocabulary) at every supervised token.  labels: (N,) int64.
    drawn, features: (M, tokens, width) regressed and wanted visual features of the M pictures written.
    """

    logits: Tensor
    labels: Tensor
    drawn: Tensor
    features: Tensor


@dataclass(frozen=True)
class Loss:
    """total: scalar to differentiate. text: mean cross-entropy per supervised token. image: mean squared error
    of the regressed visual features (0 where the batch writes no image). tokens: supervised tokens and features."""

    total: Tensor
    text: Tensor
    image: Tensor
    tokens: int


class Backbone(ABC, nn.Module):
    """A frozen dual-to-dual model. Adapters are attached to ``language_model`` and nowhere else.

    Subclasses are built with a device and give the members below; encoded samples are opaque to everyone else.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    """Name suffixes of the linear layers of ``language_model`` that carry adapters."""
    image_loss_weight: ClassVar[float] = 6.0
    """Weight of the visual features' squared error beside the cross-entropy, as released."""
    positions: Tensor | None = None
    """(batch, length) int64: what every position of the language model's forward pass under way is for, as a row of
    ``cnext.adapters.BRANCH_ROLES``: text read, image read, text written (from the position that gives the first
    token of an answer), image written. Set before each pass, in training and in generation alike."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder that adapters are attached to."""

    @abstractmethod
    def encode(self, samples: Sequence[Sample]) -> list[Any]:
        """Samples to whatever ``output`` takes: token ids, labels, visual features. Frozen parts only, no gradient."""

    @abstractmethod
    def output(self, encoded: Sequence[Any]) -> Output:
        """One forward pass over a batch of encoded samples, answers included."""

    @abstractmethod
    def question_features(self, samples: Sequence[Sample]) -> Tensor:
        """(N, hidden): the language model's last hidden state at the end of each sample's first instruction.

        With whatever adapters are active, without gradient. Never reads an answer or a target image.
        """

    @abstractmethod
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        """Greedy answers to each sample's first instruction. Never reads an answer or a target image."""

    def loss(self, encoded: Sequence[Any]) -> Loss:
        """Cross-entropy, mean over supervised tokens, plus image_loss_weight times the mean squared error."""
        return self.loss_of(self.output(encoded))

    def loss_of(self, output: Output) -> Loss:
        """The training loss of an output."""
        text = F.cross_entropy(output.logits, output.labels)
        image = F.mse_loss(output.drawn, output.features) if len(output.drawn) else text.new_zeros(())
        tokens = len(output.labels) + output.drawn.shape[:2].numel()
        return Loss(text + self.image_loss_weight * image, text.detach(), image.detach(), tokens)
