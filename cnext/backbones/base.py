"""The interface of a dual-to-dual backbone: image and text in, image and text out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Turn

CHOICES = 32
"""Samples per forward pass of ``choice_logits``."""


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
    def question_features(self, encoded: Sequence[Any]) -> Tensor:
        """(N, hidden): the language model's last hidden state at the end of each encoded sample's first instruction.

        With whatever adapters are active, without gradient. Never reads an answer or a target image.
        """

    @abstractmethod
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        """Greedy answers to each sample's first instruction. Never reads an answer or a target image."""

    @torch.no_grad()
    def choice_logits(self, samples: Sequence[Sample], answers: Sequence[str]) -> Tensor:
        """(N, answers): the logit of each answer where the answer to a sample's first instruction begins.

        The answers have equally many tokens, and the first that tells them apart counts: of letters their only one.
        With whatever adapters are active, without gradient. Never reads an answer or a target image of the samples.
        """
        asked = [Sample("", (Turn(s.turns[0].instruction, answers[0]),), image=s.image) for s in samples]
        if not asked:
            return torch.empty(0, len(answers))
        told = [replace(asked[0], turns=(replace(asked[0].turns[0], answer=answer),)) for answer in answers]
        tokens = self.output(self.encode(told)).labels.unflatten(0, (len(answers), -1))
        place = int((tokens != tokens[0]).any(0).int().argmax())
        parts = []
        for start in range(0, len(asked), CHOICES):
            encoded = self.encode(asked[start : start + CHOICES])
            logits = self.output(encoded).logits.unflatten(0, (len(encoded), -1))
            parts.append(logits[:, place, tokens[:, place]])
        return torch.cat(parts)

    def loss(self, encoded: Sequence[Any]) -> Loss:
        """Cross-entropy, mean over supervised tokens, plus image_loss_weight times the mean squared error."""
        return self.loss_of(self.output(encoded))

    def loss_of(self, output: Output) -> Loss:
        """The training loss of an output."""
        text = F.cross_entropy(output.logits, output.labels)
        image = F.mse_loss(output.drawn, output.features) if len(output.drawn) else text.new_zeros(())
        tokens = len(output.labels) + output.drawn.shape[:2].numel()
        return Loss(text + self.image_loss_weight * image, text.detach(), image.detach(), tokens)
