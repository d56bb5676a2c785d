"""Base class of backbones that write an image as VQ codes, generated autoregressively after a begin token.

    text   mean over supervised tokens of CE(head(h_{t-1}), token_t)
    image  mean over images and codes of CE(code_head(h_{t-1}), code_t)

h is the language model's last hidden state. The begin token is a text token: by generating it, the model decides to
write an image, unless ``begins_images`` puts it into the prompt. The number of codes is fixed. Tokens are generated
greedily; codes are sampled by a seed of the run and the sample, so that both are deterministic.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cnext.backbones.base import Output
from cnext.backbones.conversation import IGNORED, IMAGE_WRITTEN, TEXT_READ, CodedInputs, PromptTemplate, SequenceBuilder
from cnext.backbones.decoding import CachedDecoding, greedy
from cnext.backbones.pretrained import PretrainedBackbone
from cnext.backbones.sampling import CodeSampling, image_seed, uniform
from cnext.errors import UserError
from cnext.image_files import open_image
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task, Turn

BATCH = 16
"""Samples per forward pass without gradient, and images encoded at once."""


class CodedBackbone(PretrainedBackbone):
    """A transformers model that contains a language model and a VQ model. A subclass connects the two."""

    sampling: CodeSampling
    """How codes are chosen."""
    guidance: float
    """Scale of classifier-free guidance for codes: logits = u + guidance * (c - u), where c is with the instruction and
    u without. 1 switches it off, which halves the work."""
    begins_images: bool = False
    """Whether the prompt begins the image where one is asked for, as in the released scripts: the begin tokens are then
    neither supervised nor generated, and no text precedes the image."""
    supervises_structure: bool = True
    """Whether the tokens after rows of codes and after an image are supervised."""

    read_flops: ClassVar[float]
    """Approximate operations to encode an image that is read."""
    write_flops: ClassVar[float]
    """Approximate operations to encode a target image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Codes are nearest neighbours, so rounding would change them.
        self.vq.float()
        self.grid: tuple[int, int] = (0, 0)
        """Rows and columns of the codes of an image written."""
        self.begin_image: list[int] = []
        """Tokens that begin an image; the last one predicts the first code."""
        self.row_end: int | None = None
        """Token after each row of codes: supervised in training, inserted in generation."""
        self.end_image: list[int] = []
        """Tokens after an image written, supervised."""
        self.banned_ids: list[int] = []
        """Tokens that are not text, never generated as such."""

    @staticmethod
    def check_sampling(sample: bool, temperature: float, top_k: int, guidance: float) -> CodeSampling:
        """How codes are chosen, from the options of `load`. Raises UserError for one out of range."""
        if not 1 <= guidance < float("inf"):
            raise UserError(f"guidance must be at least 1 and finite, got {guidance}; 1 is without guidance")
        return CodeSampling(sample, temperature, top_k)

    @property
    def vq(self) -> Any:
        """The VQ model."""
        return self.model.model.vqmodel

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Tokens that end the text of an answer: the end token, and the one that begins an image."""
        return self.eos_id, self.begin_image[0]

    @property
    def tokens(self) -> int:
        """Codes of an image written."""
        return self.grid[0] * self.grid[1]

    def encoding_flops(self, task: Task) -> float:
        return self.read_flops * ("image" in task.reads) + self.write_flops * ("image" in task.writes)

    @abstractmethod
    def template(self, first: bool, reads: bool, draws: bool) -> PromptTemplate:
        """What surrounds an instruction.

        first: of the conversation.  reads: an image is read with it.  draws: the conversation is a caption: its one
        instruction asks for an image and none is read.
        """

    def instruction(self, text: str, draws: bool, known: bool) -> str:
        """An instruction as the model reads it. draws: as in `template`.  known: the answer is, as in training."""
        return text.strip()

    @abstractmethod
    def image_sequence(self, pixels: Tensor) -> SequenceBuilder:
        """The part of a sequence that an image read takes. pixels: (3, H, W)."""

    @abstractmethod
    def encode_read(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Features of images read, (3, H, W) each, by the frozen encoder."""

    @abstractmethod
    def encode_written(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Codes of target images, (3, H, W) each: (tokens,) int64 each."""

    @abstractmethod
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) of codes (N, tokens), by the VQ model's decoder."""

    @abstractmethod
    def embed(self, ids: Tensor, codes: Tensor, reads: Sequence[Tensor]) -> Tensor:
        """Input embeddings (B, L, hidden) of padded ids and codes, (B, L) both, and of the images read, in order."""

    @abstractmethod
    def code_embeddings(self, codes: Tensor) -> Tensor:
        """Input embeddings (N, hidden) of codes (N,)."""

    @abstractmethod
    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, codes) of last hidden states (N, hidden)."""

    def image_prediction(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, classes) and classes (N,) of the image loss, of hidden states (N, hidden) and the codes behind."""
        return self.code_logits(hidden), codes

    @abstractmethod
    def unconditional(self, question: CodedInputs) -> CodedInputs:
        """The sequence without instruction that guidance compares ``question`` with, both up to the first code."""

    def pixels(self, path: Path, side: int = 0) -> Tensor:
        """An image file as the encoders take it, (3, H, W). side: crop to the central square and resize to this."""
        from PIL import ImageOps

        image = open_image(path)
        if side:
            image = ImageOps.fit(image, (side, side), method=self.image_processor.resample)
        try:
            # Said, as the processor would take the rows of an image 1 or 3 pixels high for its channels.
            given = {"images": image, "input_data_format": "channels_last", "return_tensors": "pt"}
            return self.image_processor(**given, do_resize=not side)["pixel_values"][0]
        except ValueError as error:
            raise UserError(f"image {path} cannot be resized for {self.name}: {error}") from error

    @property
    def side(self) -> int:
        """Side of an image written, in pixels."""
        return self.grid[0] * 2 ** (len(self.model.config.vq_config.channel_multiplier) - 1)

    def prepare(self, sample: Sample) -> CodedInputs:
        """The sample as a sequence with pixels in place of features and codes.

        The image read belongs to the first turn, the image written to the last; the end token follows every answer.

        Raises:
            UserError: an image that cannot be read, or a sequence longer than the model's context.
        """
        read = self.pixels(sample.image) if sample.image else None
        written = self.pixels(sample.target_image, self.side) if sample.target_image else None
        return self._sequence(sample, read).build(read, written)

    def check_length(self, sample: Sample) -> None:
        read = torch.empty(3, *self.shape_read(sample.image), device="meta") if sample.image else None
        self._sequence(sample, read)

    def shape_read(self, path: Path) -> tuple[int, int]:
        """Height and width of `pixels` of an image to read, without decoding it."""
        side = self.image_processor.size["height"]
        return side, side

    def _sequence(self, sample: Sample, read: Tensor | None) -> SequenceBuilder:
        """The sequence of a sample. Raises UserError where it is too long.

        read: pixels (3, H, W) of the image to read, of which the size alone counts.
        """
        sequence = SequenceBuilder()
        begun, caption = self._begins(sample), sample.draws and sample.image is None and len(sample.turns) == 1
        for index, turn in enumerate(sample.turns):
            last, image = index + 1 == len(sample.turns), read if index == 0 else None
            template = self.template(index == 0, image is not None, caption)
            instruction = self.instruction(turn.instruction, caption, sample.target_image is not None)
            self._add_instruction(sequence, instruction, template, image, sample.image_first)
            if not (last and begun):
                sequence.add_target(self.text_ids(f" {turn.answer}") if turn.answer else [])
            if not last or not (begun or sample.target_image):
                sequence.add_target([self.eos_id])
        if sample.target_image is not None:
            (sequence.add_context if begun else sequence.add_target)(self.begin_image)
            add_structure = sequence.add_target if self.supervises_structure else sequence.add_context
            for _ in range(self.grid[0]):
                sequence.add_codes(self.grid[1], self.pad_id)
                add_structure([] if self.row_end is None else [self.row_end])
            add_structure(self.end_image)
        elif begun:
            sequence.add_context(self.begin_image)
            sequence.add_codes(1, self.pad_id)
        config: Any = self.language_model.config
        limit = config.max_position_embeddings
        if len(sequence.rows) > limit:
            raise UserError(
                f"sample {sample.origin or sample.id} is {len(sequence.rows):,} tokens long, {self.name} reads "
                f"{limit:,} at most: leave it out, or let preprocessor_config.json give smaller images"
            )
        return sequence

    def _begins(self, sample: Sample) -> bool:
        """Whether the prompt ends with the begin of an image."""
        return self.begins_images and sample.draws

    def _add_instruction(
        self,
        sequence: SequenceBuilder,
        instruction: str,
        template: PromptTemplate,
        image: Tensor | None,
        image_first: bool,
    ) -> None:
        prefix, before, separator, after, suffix = template
        sequence.add_context(prefix)
        if image is None:
            sequence.add_context(self.text_ids(before + instruction + after))
        else:
            left, right = before, separator + instruction + after
            if not image_first:
                left, right = before + instruction + separator, after
            sequence.add_context(self.text_ids(left))
            sequence.rows += self.image_sequence(image).rows
            sequence.add_context(self.text_ids(right))
        sequence.add_context(suffix)

    @torch.no_grad()
    def encode_prepared(self, prepared: Sequence[CodedInputs]) -> list[CodedInputs]:
        encoded: list[CodedInputs] = []
        with self.no_autocast():
            for start in range(0, len(prepared), BATCH):
                chunk = prepared[start : start + BATCH]
                read = iter(self.encode_read([item.read for item in chunk if item.read is not None]))
                written = iter(self.encode_written([item.written for item in chunk if item.written is not None]))
                encoded += [
                    self.with_images(
                        replace(item, written=None),
                        None if item.read is None else next(read),
                        None if item.written is None else next(written).cpu(),
                    )
                    for item in chunk
                ]
        return encoded

    def with_images(self, item: CodedInputs, read: Tensor | None, codes: Tensor | None) -> CodedInputs:
        """A prepared sample with the features of the image read and the codes of the target image."""
        filled = item.codes if codes is None else item.codes.masked_scatter(item.codes != IGNORED, codes)
        return replace(item, read=read, codes=filled)

    def padded(self, items: Sequence[CodedInputs], side: str = "right") -> tuple[Tensor, ...]:
        """Ids, labels, codes, positions and the attention mask, (B, L) each, on the model's device."""
        fields = (("ids", self.pad_id), ("labels", IGNORED), ("codes", IGNORED), ("positions", TEXT_READ))
        rows = [pad_sequence([getattr(i, name) for i in items], True, fill, side) for name, fill in fields]
        mask = pad_sequence([torch.ones_like(i.ids) for i in items], True, 0, side)
        return tuple(tensor.to(self.device) for tensor in (*rows, mask))

    def _hidden_states(self, items: Sequence[CodedInputs]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels, codes, self.positions, _ = self.padded(items)
        inputs = self.embed(ids, codes, [item.read for item in items if item.read is not None])
        # Attention is causal and padding is on the right: no position that counts sees padding, so no mask is needed.
        hidden = self.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state.to(self.device)
        return hidden, labels, codes

    def output(self, encoded: Sequence[CodedInputs]) -> Output:
        hidden, labels, codes = self._hidden_states(encoded)
        hidden, labels, codes = hidden[:, :-1], labels[:, 1:], codes[:, 1:]
        text, image = labels != IGNORED, codes != IGNORED
        logits = self.lm_head(hidden[text]).to(self.device).float()
        image_pred, image_target = self.image_prediction(hidden[image], codes[image])
        image_pred, shape = image_pred.to(self.device).float(), (-1, self.tokens)
        return Output(logits, labels[text], image_pred.view(*shape, image_pred.shape[-1]), image_target.view(shape))

    def supervised(self, encoded: Sequence[CodedInputs]) -> tuple[int, int]:
        labels = sum(int((item.labels != IGNORED).sum()) for item in encoded)
        return labels, sum(bool((item.codes != IGNORED).any()) for item in encoded)

    @torch.no_grad()
    def question_features(self, encoded: Sequence[CodedInputs]) -> Tensor:
        parts = [torch.empty(0, self.embed_tokens.embedding_dim, device=self.device)]
        for start in range(0, len(encoded), BATCH):
            questions = [item.question for item in encoded[start : start + BATCH]]
            last = torch.tensor([len(question) - 1 for question in questions], device=self.device)
            hidden, _, _ = self._hidden_states(questions)
            parts.append(hidden[torch.arange(len(questions), device=self.device), last])
        return torch.cat(parts)

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        asked = [
            replace(s, turns=(Turn(s.turns[0].instruction),), target_image=None, asks_image=s.draws) for s in samples
        ]
        answers: list[Prediction] = []
        for start in range(0, len(asked), BATCH):
            answers += self._answers(asked[start : start + BATCH], max_new_tokens)
        return answers

    def _answers(self, asked: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        """Answers of one batch."""
        questions = [item.question for item in self.encode(asked)]
        begun = {index: questions[index] for index, sample in enumerate(asked) if self._begins(sample)}
        undecided = [index for index in range(len(asked)) if index not in begun]
        written: dict[int, list[int]] = {}
        if undecided:
            prompts = self._prompts([questions[index] for index in undecided])
            written = dict(zip(undecided, greedy(self, *prompts, max_new_tokens), strict=True))
        for index, ids in written.items():
            written[index] = [token for token in ids if token not in (self.eos_id, self.pad_id)]
            if written[index][-1:] == self.begin_image[:1]:
                begun[index] = questions[index].with_answer([*written[index], *self.begin_image[1:]])
        images: dict[int, numpy.ndarray] = {}
        if begun:
            codes = self.generate_codes(list(begun.values()), [image_seed(self.seed, asked[index]) for index in begun])
            images = dict(zip(begun, self._images(codes), strict=True))
        texts = [self.tokenizer.decode(written.get(i, []), skip_special_tokens=True) for i in range(len(asked))]
        return [Prediction(text.strip(), images.get(index)) for index, text in enumerate(texts)]

    def _prompts(self, items: Sequence[CodedInputs]) -> tuple[Tensor, Tensor, Tensor]:
        """Input embeddings (B, L, hidden), attention mask and positions (B, L), padded on the left."""
        ids, _, codes, positions, mask = self.padded(items, "left")
        reads = [item.read for item in items if item.read is not None]
        return self.embed(ids, codes, reads), mask, positions

    @torch.no_grad()
    def generate_codes(self, begun: Sequence[CodedInputs], seeds: Sequence[int]) -> Tensor:
        """Codes (N, tokens) int64 of images, each chosen by ``sampling`` after those before it.

        With classifier-free guidance where ``guidance`` is above 1.

        Args:
            begun: sequences whose last token predicts the first code.
            seeds: of each image, by which its codes are sampled.
        """
        numbers = uniform(seeds, self.tokens).to(self.device)
        guided = self.guidance > 1
        decoding = CachedDecoding(self, *self._prompts([*begun, *map(self.unconditional, begun)] if guided else begun))
        codes: list[Tensor] = []
        while True:
            logits = self.code_logits(decoding.last).to(self.device).float()
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + self.guidance * (conditional - unconditional)
            codes.append(self.sampling.choose(logits, numbers[:, len(codes)]))
            if len(codes) == self.tokens:
                return torch.stack(codes, 1)
            appended = codes[-1].repeat(2) if guided else codes[-1]
            decoding.append(self.code_embeddings(appended), IMAGE_WRITTEN)
            if self.row_end is not None and len(codes) % self.grid[1] == 0:
                decoding.append(self.embed_tokens(torch.full_like(appended, self.row_end)), IMAGE_WRITTEN)

    @torch.no_grad()
    def _images(self, codes: Tensor) -> list[numpy.ndarray]:
        """Images, (H, W, 3) uint8 each, of codes (N, tokens)."""
        with self.no_autocast():
            pixels = self.decode_codes(codes).cpu().float()
        processor = self.image_processor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        rescaled = ((pixels * std + mean) / processor.rescale_factor).round().clamp(0, 255)
        return list(rescaled.to(torch.uint8).permute(0, 2, 3, 1).numpy())
