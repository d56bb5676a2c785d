"""The interface of a dual-to-dual backbone: image and text in, image and text out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task, Turn

CHOICES = 32
"""Samples per forward pass of ``choice_logits``."""


@dataclass(frozen=True)
class Output:
    """What a batch's supervised positions give, and what they should.

    logits: (N, vocabulary) at every supervised token.  labels: (N,) int64.
    drawn, features: what is drawn of the M pictures written, and what is wanted: either visual features regressed,
        (M, tokens, width) both, or logits over a codebook, (M, tokens, codes), and the codes wanted, (M, tokens) int64.
    """

    logits: Tensor
    labels: Tensor
    drawn: Tensor
    features: Tensor


@dataclass(frozen=True)
class Loss:
    """total: scalar to differentiate. text: mean cross-entropy per supervised token. image: `image_loss` of what is
    drawn (0 where the batch writes no image). tokens: supervised tokens and features."""

    total: Tensor
    text: Tensor
    image: Tensor
    tokens: int


def image_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of regressed features, or mean cross-entropy where codes are wanted. See `Output`."""
    if wanted.is_floating_point():
        return F.mse_loss(drawn, wanted)
    return F.cross_entropy(drawn.flatten(0, 1), wanted.flatten())


def image_distance(given: Output, wanted: Output) -> Tensor:
    """How far what two models draw for the same batch is apart: mean squared error of features, or of codes the mean
    over tokens of KL(wanted || given). 0 where the batch writes no image."""
    if not len(given.drawn):
        return given.logits.new_zeros(())
    if given.features.is_floating_point():
        return F.mse_loss(given.drawn, wanted.drawn)
    logs, wanted_logs = (output.drawn.flatten(0, 1).log_softmax(-1) for output in (given, wanted))
    return F.kl_div(logs, wanted_logs, reduction="batchmean", log_target=True)


class Backbone(ABC, nn.Module):
    """A frozen dual-to-dual model. Adapters are attached to ``language_model`` and nowhere else.

    Prepared and encoded samples are opaque to everyone else.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    """Name suffixes of the linear layers of ``language_model`` that carry adapters."""
    image_loss_weight: ClassVar[float] = 6.0
    """Weight of `image_loss` beside the cross-entropy of the text; SEED-X's, as released, unless a backbone says."""
    encodes_ahead: ClassVar[bool] = False
    """Whether a task's training samples are small enough, encoded, to be kept; else each batch is encoded when due."""
    picture_tokens: ClassVar[tuple[int, int]]
    """Positions of the language model that a picture takes, typically: where it is read, and where it is written."""
    drawing_flops: ClassVar[float] = 0.0
    """Operations that turn what the language model gives for a picture into pixels, about."""
    untrained: ClassVar[str] = ""
    """What the released weights were not trained to do, in one sentence; "" where that is nothing of the six tasks."""
    positions: Tensor | None = None
    """(batch, length) int64: what every position of the language model's forward pass under way is for, as a row of
    ``cnext.adapters.BRANCH_ROLES``: text read, image read, text written (from the position that gives the first
    token of an answer), image written. Set before each pass, in training and in generation alike."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder that adapters are attached to."""

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the language model's first parameter."""
        return next(self.language_model.parameters()).device

    @classmethod
    @abstractmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
    ) -> Backbone:
        """The pretrained model, frozen, in evaluation mode.

        Args:
            weights: folder or file of the released weights; None where they come with the package.
            dtype: of the model's parameters.
            device_map: how accelerate spreads the model over several devices ("auto", "balanced"); None: one device.
            checkpointing: whether the language model computes activations again in the backward pass.

        Raises:
            UserError: weights that are missing or do not fit: what was expected, what was found, what to do.
        """

    @classmethod
    def meta(cls, weights: Path | None = None) -> Backbone:
        """The model on the meta device, at full size and without numbers, which takes no memory.

        weights: folder of the released weights, of which at most the configuration is read.

        Raises:
            UserError: its sizes are not known without the weights.
        """
        raise UserError(f"the sizes of backbone {cls.name} are not known here; give --weights, or leave --gpus away")

    def encoding_flops(self, task: Task) -> float:
        """Operations of the frozen visual encoder for a sample of a task, about."""
        return 0.0

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        """The files of weights that ``load`` reads, found without reading them; [] where that cannot be said.

        Raises:
            UserError: as ``load``, for files that are missing.
        """
        return []

    @classmethod
    def missing_to_draw(cls, weights: Path | None) -> str:
        """What is not there of what turns features or codes into pixels, found without loading it; "" where all is."""
        return ""

    @abstractmethod
    def connections(self) -> dict[str, nn.Parameter]:
        """The layers between the visual parts and the language model, by name: trained where a recipe says so."""

    @abstractmethod
    def released_extras(self) -> dict[str, nn.Parameter]:
        """What the paper's released code trains besides branches and connections: embeddings, output head, norms."""

    def require_drawing(self) -> None:
        """Raises UserError where what turns features or codes into pixels is not there: what, and where to put it."""

    @abstractmethod
    def prepare(self, sample: Sample) -> Any:
        """The part of encoding that needs no parameters: files read, pixels resized, text tokenized.

        Runs in worker processes as well: touches no device, and what it gives can be pickled.
        """

    @abstractmethod
    def encode_prepared(self, prepared: Sequence[Any]) -> list[Any]:
        """Prepared samples to what ``output`` takes. Frozen parts only, no gradient."""

    def encode(self, samples: Sequence[Sample]) -> list[Any]:
        """Samples to whatever ``output`` takes: token ids, labels, visual features. Frozen parts only, no gradient."""
        return self.encode_prepared([self.prepare(sample) for sample in samples])

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
        asked = [
            Sample("", (Turn(s.turns[0].instruction, answers[0]),), s.image, image_first=s.image_first, tiled=s.tiled)
            for s in samples
        ]
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

    @abstractmethod
    def supervised(self, encoded: Sequence[Any]) -> tuple[int, int]:
        """How many rows of logits, and how many pictures drawn, `output` gives for these samples."""

    def loss(self, encoded: Sequence[Any], whole: tuple[float, ...] | None = None) -> Loss:
        """Cross-entropy, mean over supervised tokens, plus image_loss_weight times the image loss.

        whole: what `supervised` gives of the batch that these samples are a part of; the losses of its parts, which
        are then shares of its means, add up to its loss.
        """
        return self.loss_of(self.output(encoded), whole)

    def loss_of(self, output: Output, whole: tuple[float, ...] | None = None) -> Loss:
        """The training loss of an output. whole: as in `loss`."""
        text = F.cross_entropy(output.logits, output.labels)
        image = image_loss(output.drawn, output.features) if len(output.drawn) else text.new_zeros(())
        if whole is not None:
            text, image = text * (len(output.labels) / whole[0]), image * (len(output.drawn) / max(whole[1], 1))
        tokens = len(output.labels) + output.drawn.shape[:2].numel()
        return Loss(text + self.image_loss_weight * image, text.detach(), image.detach(), tokens)
