"""Base class of backbones: frozen models that read and write text, images or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import packages
from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks.base import ImageNeed, Sample, Task, Turn

CHOICES_BATCH = 32
"""Samples per forward pass of ``choice_logits``."""


@dataclass(frozen=True)
class Output:
    """Predictions and targets at the supervised positions of a batch: N text tokens and M images.

    logits: (N, vocabulary) float32.  labels: (N,) int64.
    image_pred, image_target: either visual features that are regressed, (M, tokens, width) float both; or logits over a
        codebook, (M, tokens, codes) float32, and the codes, (M, tokens) int64.
    """

    logits: Tensor
    labels: Tensor
    image_pred: Tensor
    image_target: Tensor


@dataclass(frozen=True)
class Loss:
    """Training loss of a batch, in nats for text and codes.

    total: scalar to differentiate.  text: mean cross-entropy over supervised tokens, detached.  image: `image_loss`,
    detached, 0 where the batch writes no image.  tokens: number of supervised tokens, features and codes.
    """

    total: Tensor
    text: Tensor
    image: Tensor
    tokens: int


def image_loss(image_pred: Tensor, image_target: Tensor) -> Tensor:
    """Loss of the images written: mean squared error of features, or mean cross-entropy of codes.

    Args:
        image_pred, image_target: as in `Output`, of at least one image.

    Returns:
        A scalar.
    """
    if image_target.is_floating_point():
        return F.mse_loss(image_pred, image_target)
    return F.cross_entropy(image_pred.flatten(0, 1), image_target.flatten())


def image_distance(student: Output, teacher: Output) -> Tensor:
    """Distance of the images that two models write for one batch, for distillation.

    Features: mean squared error.  Codes: mean over positions of KL(teacher || student), in nats.

    Returns:
        A scalar; 0 where the batch writes no image.
    """
    if not len(student.image_pred):
        return student.logits.new_zeros(())
    if student.image_target.is_floating_point():
        return F.mse_loss(student.image_pred, teacher.image_pred)
    logs, teacher_logs = (output.image_pred.flatten(0, 1).log_softmax(-1) for output in (student, teacher))
    return F.kl_div(logs, teacher_logs, reduction="batchmean", log_target=True)


class Backbone(ABC, nn.Module):
    """A frozen model that reads and writes text, images or both.

    Adapters are attached to ``language_model`` and nowhere else. What `prepare` and `encode_prepared` return is opaque:
    it is only passed on to `output`, `supervised` and `question_features` of the same backbone.

    Example:
        >>> backbone = cnext.backbones.load("tiny").load()
        >>> encoded = backbone.encode(samples)  # of cnext.tasks.base.Sample
        >>> backbone.loss(encoded).total.backward()
        >>> backbone.generate(samples, max_new_tokens=8)[0].text
    """

    name: ClassVar[str]
    """Name under which the backbone is registered, as in ``--backbone``."""
    targets: ClassVar[tuple[str, ...]]
    """Name suffixes of the linear layers of ``language_model`` that get adapters."""
    connection_names: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the names of parameters between the visual parts and the language model."""
    image_loss_weight: float = 6.0
    """Weight of `image_loss` in the total loss. Default: that of the released SEED-X code."""
    option_files: ClassVar[tuple[str, ...]] = ()
    """Options of `load` that name a file of text. A run is not resumed with other content."""
    encodes_ahead: ClassVar[bool] = False
    """Whether encoded samples are so small that those of a whole task are kept in memory. Otherwise each batch is
    encoded when it is trained on."""
    picture_tokens: ClassVar[tuple[int, int]]
    """Typical number of positions of an image: where it is read, and where it is written. For estimates of cost."""
    drawing_flops: ClassVar[float] = 0.0
    """Approximate operations to decode one image from features or codes to pixels. For estimates of cost."""
    untrained: ClassVar[str] = ""
    """What the released weights were not trained to do, in one sentence; "" if they were for all six tasks."""
    positions: Tensor | None = None
    """(batch, length) int64: what each position of the current forward pass is for, a row of
    ``cnext.adapters.branch_roles`` of the suite's modalities: 0 text read, 1 image read, 2 text written (from the
    position that predicts the first token of an answer), 3 image written. A new tensor, set before each pass of
    training and generation."""
    seed: int = 0
    """Of a run: where generation samples, an answer follows from this and its question."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder that adapters are attached to, without its head."""

    @property
    def device(self) -> torch.device:
        """Device of token ids and of what is returned: that of the language model's first parameter."""
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
        """Loads the pretrained model, frozen, in evaluation mode.

        Args:
            device: where the model goes, unless ``device_map`` says so.
            weights: folder or file of the released weights; None where they come with the package.
            dtype: of the model's parameters.
            device_map: how accelerate distributes the model over devices ("auto", "balanced"); None: one device.
            checkpointing: activation checkpointing in the language model: recompute in the backward pass.

        Returns:
            The backbone.

        Raises:
            UserError: weights that are missing or do not fit.
        """

    @classmethod
    def meta(cls, weights: Path | None = None) -> Backbone:
        """The full-size model on the meta device, without memory, from which sizes are counted.

        Args:
            weights: folder of the released weights, of which at most the configuration is read.

        Raises:
            UserError: its sizes are not known without the weights.
        """
        raise UserError(f"the sizes of backbone {cls.name} are not known here; give --weights, or leave --gpus away")

    def encoding_flops(self, task: Task) -> float:
        """Approximate operations of the frozen visual encoder for one sample of a task. For estimates of cost."""
        return 0.0

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        """Finds the files of weights that `load` reads, without reading tensors.

        Returns:
            The files; [] if they are not known.

        Raises:
            UserError: as `load`, for files that are missing.
        """
        return []

    @classmethod
    def missing_to_draw(cls, weights: Path | None) -> str:
        """What `generate` needs to decode images and is not there, as an error message; "" if nothing is missing.

        Loads nothing.
        """
        return ""

    @classmethod
    def modalities(cls, weights: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What the model reads and what it writes: tasks that need more are refused before weights are loaded.

        Returns:
            Two of ("text",), ("image",) and ("text", "image"). Default: the latter twice.

        Raises:
            UserError: they depend on the weights, and these are missing or no model.
        """
        return ("text", "image"), ("text", "image")

    @classmethod
    def unmet_need(cls, size: tuple[int, int]) -> str:
        """Why an image of this width and height cannot be read, "" if it can. Asked before a run loads weights."""
        return ""

    @classmethod
    def image_need(cls, weights: Path | None) -> ImageNeed:
        """`unmet_need` where it depends on the weights, of which at most the configuration is read."""
        return cls.unmet_need

    def check_length(self, sample: Sample) -> None:
        """Asked of every sample before training, of test samples with the question alone. Decodes no image.

        Raises:
            UserError: as `prepare`, for a sample that is too long.
        """

    def length(self, sample: Sample) -> int | None:
        """Tokens of a training sample, answers included, counted as by the paper's code, for `Task.length_filter`.

        Decodes no image. None: this backbone counts otherwise, so that the filter does not apply.
        """
        return None

    def connections(self) -> dict[str, nn.Parameter]:
        """Parameters of `connection_names`, by name: trained if a recipe's ``trainable`` says so."""
        return {
            name: parameter for name, parameter in self.named_parameters() if name.startswith(self.connection_names)
        }

    @abstractmethod
    def released_extras(self) -> dict[str, nn.Parameter]:
        """What the paper's released code trains besides branches and connections: embeddings, output head, norms.

        Returns:
            Parameters by name.
        """

    def require_drawing(self) -> None:
        """Checks that images can be decoded to pixels.

        Raises:
            UserError: a file is missing or broken: which, and where it is expected.
        """

    @abstractmethod
    def prepare(self, sample: Sample) -> Any:
        """The part of encoding without parameters: reads files, resizes images, tokenizes text.

        Runs in worker processes as well: it uses no device, and its result can be pickled.

        Raises:
            UserError: an image that cannot be read, or a sample that is too long.
        """

    @abstractmethod
    def encode_prepared(self, prepared: Sequence[Any]) -> list[Any]:
        """Encodes prepared samples by the frozen parts, without gradient.

        Args:
            prepared: results of `prepare`.

        Returns:
            One encoded sample each: token ids, labels, visual features or codes.
        """

    def encode(self, samples: Sequence[Sample]) -> list[Any]:
        """Encodes samples: `encode_prepared` of `prepare`."""
        return self.encode_prepared([self.prepare(sample) for sample in samples])

    @abstractmethod
    def output(self, encoded: Sequence[Any]) -> Output:
        """One forward pass over a batch of encoded samples, answers included.

        Args:
            encoded: results of `encode`, at least one.
        """

    @abstractmethod
    def question_features(self, encoded: Sequence[Any]) -> Tensor:
        """Last hidden state of the language model at the end of each sample's first instruction, without gradient.

        With the adapters that are active. Answers and target images are not read.

        Returns:
            (N, hidden), on `device`; (0, hidden) of no samples.
        """

    @torch.no_grad()
    def question_means(self, encoded: Sequence[Any]) -> Tensor:
        """Mean last hidden state over the positions that read text of each sample's first instruction.

        They have attended to an image before them. With the adapters that are active, without gradient. Answers and
        target images are not read. A backbone may override it to take several samples at once; one at a time there is
        no padding.

        Returns:
            (N, hidden), on `device`; (0, hidden) of no samples.
        """
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            # A tensor, or a structure or tuple with it, as language models return them.
            states = getattr(output, "last_hidden_state", output)
            found.append(states if isinstance(states, Tensor) else states[0])

        hook = self.language_model.register_forward_hook(keep)
        try:
            parts = [self.question_features([])]
            for item in encoded:
                found.clear()
                self.positions = None
                self.question_features([item])
                [[states]] = found
                text = torch.ones(len(states), dtype=torch.bool) if self.positions is None else self.positions[0] == 0
                states = states[text.to(states.device)] if text.any() else states
                parts.append(states.float().mean(0, keepdim=True).to(parts[0]))
        finally:
            hook.remove()
        return torch.cat(parts)

    @abstractmethod
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        """Answers each sample's first instruction, text by greedy decoding. Answers and target images are not read.

        An answer depends on ``seed`` and its own sample, not on the others.

        Args:
            samples: any number.
            max_new_tokens: most text tokens of an answer.

        Returns:
            One prediction per sample: text, and the image where one was written, (H, W, 3) uint8.
        """

    @torch.no_grad()
    def choice_logits(self, samples: Sequence[Sample], answers: Sequence[str]) -> Tensor:
        """Logits of given answers to each sample's first instruction, as in multiple choice.

        The first token in which the answers differ counts. With the adapters that are active, without gradient. The
        samples' own answers and target images are not read.

        Returns:
            (N, len(answers)) float32.

        Example:
            >>> backbone.choice_logits(samples, ["A", "B", "C"]).argmax(1)
        """
        asked = [
            replace(s, turns=(Turn(s.turns[0].instruction, answers[0]),), target_image=None, prompt="", references=())
            for s in samples
        ]
        if not asked:
            return torch.empty(0, len(answers))
        answered = [replace(asked[0], turns=(replace(asked[0].turns[0], answer=answer),)) for answer in answers]
        encoded = self.encode(answered)
        rows = self.output(encoded).labels.split([self.supervised([one])[0] for one in encoded])
        tokens = torch.stack([row[: min(map(len, rows))] for row in rows])
        index = int((tokens != tokens[0]).any(0).int().argmax())
        parts = []
        for start in range(0, len(asked), CHOICES_BATCH):
            encoded = self.encode(asked[start : start + CHOICES_BATCH])
            logits = self.output(encoded).logits.unflatten(0, (len(encoded), -1))
            parts.append(logits[:, index, tokens[:, index]])
        return torch.cat(parts)

    def outer_model(self) -> Any:
        """The outermost transformers model that contains the language model, or one that shares all its layers.

        Raises: UserError where there is none.
        """
        from transformers import PreTrainedModel

        for module in self.modules():
            if isinstance(module, PreTrainedModel) and any(m is self.language_model for m in module.modules()):
                return module
        raise UserError(
            f"backbone {self.name}: its language model is in no transformers model, and only such can be exported or "
            "take an adapter from elsewhere"
        )

    def logits_model(self) -> Any:
        """The model whose logits tell whether weights are those of an export; its layers may be sharded.

        It calls the layers that training calls, as a model that only shares their parts would read single shards.
        """
        return outer_model(self)

    @abstractmethod
    def supervised(self, encoded: Sequence[Any]) -> tuple[int, int]:
        """Number of supervised text tokens and of images written: N and M of `Output` for these samples."""

    def loss(self, encoded: Sequence[Any], whole: tuple[float, ...] | None = None) -> Loss:
        """Training loss of encoded samples: text + image_loss_weight * image, see `Loss`.

        Args:
            encoded: results of `encode`, at least one.
            whole: `supervised` of the batch that these samples are a part of. The losses are then weighted so that
                those of all parts add up to the batch's.
        """
        return self.loss_of(self.output(encoded), whole)

    def loss_of(self, output: Output, whole: tuple[float, ...] | None = None) -> Loss:
        """Training loss of an output. whole: as in `loss`."""
        text = F.cross_entropy(output.logits, output.labels) if len(output.labels) else output.logits.new_zeros(())
        image = image_loss(output.image_pred, output.image_target) if len(output.image_pred) else text.new_zeros(())
        if whole is not None:
            text, image = (
                text * (len(output.labels) / max(whole[0], 1)),
                image * (len(output.image_pred) / max(whole[1], 1)),
            )
        tokens = len(output.labels) + output.image_pred.shape[:2].numel()
        return Loss(text + self.image_loss_weight * image, text.detach(), image.detach(), tokens)


def outer_model(backbone: Backbone) -> Any:
    """The outermost transformers model that contains the language model, which other tools load.

    Raises: UserError where there is none, or no transformers.
    """
    packages.require_installed(f"the exchange of weights of backbone {backbone.name}", ["transformers"])
    return backbone.outer_model()
