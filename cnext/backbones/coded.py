"""The base of backbones that write a picture as codes of a VQ codebook, one after another, after a begin token.

    text   mean over supervised tokens of CE(head(h_{t-1}), token_t)
    image  mean over pictures and codes of CE(code_head(h_{t-1}), code_t)

h is the language model's last hidden state. The begin token is text: the model decides by it whether it draws, and
how many codes follow is fixed, so that a picture needs no end. Both are drawn greedily, which repeats exactly.
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
from cnext.backbones.conversation import IGNORED, IMAGE_WRITTEN, TEXT_READ, Conversation, Encoded, Frame
from cnext.backbones.decoding import Decoding, greedy
from cnext.backbones.pretrained import PretrainedBackbone, open_picture
from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task, Turn

BATCH = 16
"""Samples per forward pass where nothing is learnt, and pictures encoded at once."""


class CodedBackbone(PretrainedBackbone):
    """A transformers model with a language model and a VQ model inside. A subclass says how the two meet."""

    guidance: float
    """Classifier-free guidance of the codes drawn, logits = blank + guidance * (given - blank), where blank is without
    the instruction; 1 switches it off, which halves the work."""

    look_flops: ClassVar[float]
    """Operations that encode a picture read, about."""
    code_flops: ClassVar[float]
    """Operations that encode a picture to write, about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Codes are nearest neighbours, so rounding would change them.
        self.vq.float()
        self.grid: tuple[int, int] = (0, 0)
        """Rows and columns of the codes of a picture written."""
        self.begin: list[int] = []
        """Tokens that begin a picture; the last gives the first code."""
        self.row_end: int | None = None
        """The token after each row of codes, supervised in training and put there in generation."""
        self.end: list[int] = []
        """Tokens after a picture written, supervised."""
        self.never: list[int] = []
        """Tokens that are no text."""

    @property
    def vq(self) -> Any:
        return self.model.model.vqmodel

    @property
    def tokens(self) -> int:
        """Codes of a picture written."""
        return self.grid[0] * self.grid[1]

    def encoding_flops(self, task: Task) -> float:
        return self.look_flops * ("image" in task.reads) + self.code_flops * ("image" in task.writes)

    @abstractmethod
    def frame(self, opening: bool, reads: bool) -> Frame:
        """What stands around an instruction. opening: the conversation's first.  reads: with a picture."""

    @abstractmethod
    def picture(self, pixels: Tensor) -> Conversation:
        """The part of a sequence that a picture read takes."""

    @abstractmethod
    def look(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Pictures read, (3, H, W) each, through the frozen encoder."""

    @abstractmethod
    def code(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """The codes, (tokens,) int64 each, of pictures to write, (3, H, W) each."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes, (N, tokens), through the VQ model's decoder: pixels, (N, 3, H, W)."""

    @abstractmethod
    def embed(self, ids: Tensor, codes: Tensor, reads: Sequence[Tensor]) -> Tensor:
        """Input embeddings (B, L, hidden) of padded ids and codes, (B, L) both, and of the pictures read, in order."""

    @abstractmethod
    def code_embeddings(self, codes: Tensor) -> Tensor:
        """(N, hidden) for codes, (N,)."""

    @abstractmethod
    def code_logits(self, hidden: Tensor) -> Tensor:
        """(N, codes) for last hidden states, (N, hidden)."""

    @abstractmethod
    def without_instruction(self, question: Encoded) -> Encoded:
        """What guidance compares a question with, its `begin` included: the same with nothing asked."""

    def pixels(self, path: Path, side: int = 0) -> Tensor:
        """An image file as the encoders take it, (3, H, W). side: of the middle square, which is what is written."""
        from PIL import ImageOps

        image = open_picture(path)
        if side:
            image = ImageOps.fit(image, (side, side), method=self.image_processor.resample)
        try:
            return self.image_processor(images=image, do_resize=not side, return_tensors="pt")["pixel_values"][0]
        except ValueError as error:
            raise UserError(f"image {path} cannot be resized for {self.name}: {error}") from error

    @property
    def side(self) -> int:
        """Pixels of a side of a picture written."""
        return self.grid[0] * 2 ** (len(self.model.config.vq_config.channel_multiplier) - 1)

    def prepare(self, sample: Sample) -> Encoded:
        """The sample as a sequence with pixels in place of what is encoded. The first turn has the picture read, the
        end token follows every answer, and the picture written the last one.

        Raises: UserError: an image that cannot be read, or a sequence longer than the model's positions.
        """
        read = self.pixels(sample.image) if sample.image else None
        written = self.pixels(sample.target_image, self.side) if sample.target_image else None
        told = Conversation()
        for index, turn in enumerate(sample.turns):
            self._ask(told, turn.instruction.strip(), index == 0, read if index == 0 else None, sample.image_first)
            told.write(self.text(f" {turn.answer}") if turn.answer else [])
            if written is None or index + 1 < len(sample.turns):
                told.write([self.eos])
        if written is not None:
            told.write(self.begin)
            for _ in range(self.grid[0]):
                told.write_codes(self.grid[1], self.pad)
                told.write([] if self.row_end is None else [self.row_end])
            told.write(self.end)
        config: Any = self.language_model.config
        most = config.max_position_embeddings
        if len(told.cells) > most:
            raise UserError(
                f"sample {sample.origin or sample.id} is {len(told.cells):,} tokens long, {self.name} reads {most:,} "
                "at most: leave it out, or let preprocessor_config.json give smaller pictures"
            )
        return told.encoded(read, written)

    def _ask(self, told: Conversation, instruction: str, opening: bool, read: Tensor | None, image_first: bool) -> None:
        head, before, glue, after, tail = self.frame(opening, read is not None)
        told.read(head)
        if read is None:
            told.read(self.text(before + instruction + after))
        else:
            parts = (before, glue + instruction + after) if image_first else (before + instruction + glue, after)
            told.read(self.text(parts[0]))
            told.cells += self.picture(read).cells
            told.read(self.text(parts[1]))
        told.read(tail)

    @torch.no_grad()
    def encode_prepared(self, prepared: Sequence[Encoded]) -> list[Encoded]:
        encoded: list[Encoded] = []
        with self.exactly():
            for start in range(0, len(prepared), BATCH):
                chunk = prepared[start : start + BATCH]
                read = iter(self.look([item.read for item in chunk if item.read is not None]))
                written = iter(self.code([item.written for item in chunk if item.written is not None]))
                encoded += [
                    self.filled(
                        replace(item, written=None),
                        None if item.read is None else next(read),
                        None if item.written is None else next(written).cpu(),
                    )
                    for item in chunk
                ]
        return encoded

    def filled(self, item: Encoded, read: Tensor | None, codes: Tensor | None) -> Encoded:
        """A prepared sample with what its pictures are encoded to."""
        told = item.codes if codes is None else item.codes.masked_scatter(item.codes != IGNORED, codes)
        return replace(item, read=read, codes=told)

    def padded(self, items: Sequence[Encoded], side: str = "right") -> tuple[Tensor, ...]:
        """Ids, labels, codes, positions and the mask of what is no padding, (B, L) each, on the model's device."""
        fields = (("ids", self.pad), ("labels", IGNORED), ("codes", IGNORED), ("positions", TEXT_READ))
        rows = [pad_sequence([getattr(i, name) for i in items], True, fill, side) for name, fill in fields]
        mask = pad_sequence([torch.ones_like(i.ids) for i in items], True, 0, side)
        return tuple(tensor.to(self.device) for tensor in (*rows, mask))

    def _hidden(self, items: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        ids, labels, codes, self.positions, _ = self.padded(items)
        inputs = self.embed(ids, codes, [item.read for item in items if item.read is not None])
        # Causal attention and padding on the right: no position that counts sees a padded one, so no mask is needed.
        hidden = self.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state.to(self.device)
        return hidden, labels, codes

    def output(self, encoded: Sequence[Encoded]) -> Output:
        hidden, labels, codes = self._hidden(encoded)
        given, labels, codes = hidden[:, :-1], labels[:, 1:], codes[:, 1:]
        told, drawn = labels != IGNORED, codes != IGNORED
        logits = self.model.lm_head(given[told]).to(self.device).float()
        pictures = self.code_logits(given[drawn]).to(self.device).float()
        shape = (-1, self.tokens)
        return Output(logits, labels[told], pictures.view(*shape, pictures.shape[-1]), codes[drawn].view(shape))

    def supervised(self, encoded: Sequence[Encoded]) -> tuple[int, int]:
        labels = sum(int((item.labels != IGNORED).sum()) for item in encoded)
        return labels, sum(bool((item.codes != IGNORED).any()) for item in encoded)

    @torch.no_grad()
    def question_features(self, encoded: Sequence[Encoded]) -> Tensor:
        parts = [torch.empty(0, self.embed_tokens.embedding_dim, device=self.device)]
        for start in range(0, len(encoded), BATCH):
            questions = [item.question for item in encoded[start : start + BATCH]]
            last = torch.tensor([len(question) - 1 for question in questions], device=self.device)
            hidden, _, _ = self._hidden(questions)
            parts.append(hidden[torch.arange(len(questions), device=self.device), last])
        return torch.cat(parts)

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        asked = [replace(s, turns=(Turn(s.turns[0].instruction),), target_image=None) for s in samples]
        answers: list[Prediction] = []
        for start in range(0, len(asked), BATCH):
            questions = [item.question for item in self.encode(asked[start : start + BATCH])]
            written = self._write(questions, max_new_tokens)
            drawing = [index for index, ids in enumerate(written) if ids and ids[-1] == self.begin[0]]
            begun = [questions[index].before_codes([*written[index], *self.begin[1:]]) for index in drawing]
            images = dict(zip(drawing, self._pictures(self.draw(begun)), strict=True)) if begun else {}
            answers += [
                Prediction(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), images.get(index))
                for index, ids in enumerate(written)
            ]
        return answers

    def _decoding(self, begun: Sequence[Encoded]) -> Decoding:
        ids, _, codes, positions, mask = self.padded(begun, "left")
        reads = [item.read for item in begun if item.read is not None]
        return Decoding(self, self.embed(ids, codes, reads), mask, positions)

    def _write(self, questions: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
        """Text tokens up to the end token (dropped) or the one that begins a picture (kept)."""
        written = greedy(
            self._decoding(questions),
            self.model.lm_head,
            self.embed_tokens,
            stops=(self.eos, self.begin[0]),
            never=self.never,
            pad=self.pad,
            max_new_tokens=max_new_tokens,
        )
        return [[index for index in ids if index not in (self.eos, self.pad)] for ids in written]

    @torch.no_grad()
    def draw(self, begun: Sequence[Encoded]) -> Tensor:
        """The most likely code after another of each picture begun, (N, tokens) int64, with guidance above 1."""
        guided = self.guidance > 1
        decoding = self._decoding([*begun, *map(self.without_instruction, begun)] if guided else begun)
        codes: list[Tensor] = []
        while True:
            logits = self.code_logits(decoding.last).to(self.device).float()
            if guided:
                given, blank = logits.chunk(2)
                logits = blank + self.guidance * (given - blank)
            codes.append(logits.argmax(-1))
            if len(codes) == self.tokens:
                return torch.stack(codes, 1)
            fed = codes[-1].repeat(2) if guided else codes[-1]
            decoding.feed(self.code_embeddings(fed), IMAGE_WRITTEN)
            if self.row_end is not None and len(codes) % self.grid[1] == 0:
                decoding.feed(self.embed_tokens(torch.full_like(fed, self.row_end)), IMAGE_WRITTEN)

    @torch.no_grad()
    def _pictures(self, codes: Tensor) -> list[numpy.ndarray]:
        """Codes, (N, tokens), as pictures, (H, W, 3) uint8 each."""
        with self.exactly():
            pixels = self.decode(codes).cpu().float()
        processor = self.image_processor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        rescaled = ((pixels * std + mean) / processor.rescale_factor).round().clamp(0, 255)
        return list(rescaled.to(torch.uint8).permute(0, 2, 3, 1).numpy())
