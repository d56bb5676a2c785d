"""Emu3: text and the codes of pictures in one vocabulary, under one head.

    picture  <image start> rows*columns <image token> (columns codes, row end) x rows <end of frame> <image end>

is read and written alike. Of a picture written, codes are supervised among the codes, and what stands around them
among all tokens. Its size is fixed by the image processor's min_pixels, and in generation the size and the ends of rows
are put there: of what follows <image start> the model chooses the codes alone. max_pixels is set to min_pixels, 512 x
512 as released, so that editing, which takes two pictures of 64 x 65 tokens, stays within 9,216 positions.

Reference: Emu3, arXiv 2409.18869, which weights the loss of visual tokens by 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import IGNORED, IMAGE_READ, TEXT_READ, Conversation, Encoded, Frame
from cnext.errors import UserError

SYSTEM = "You are a helpful assistant. "
ROW_END = "<|extra_200|>"


class Emu3Backbone(CodedBackbone):
    """``Emu3ForConditionalGeneration`` on all six tasks."""

    name: ClassVar[str] = "emu3"
    model_class: ClassVar[str] = "Emu3ForConditionalGeneration"
    model_type: ClassVar[str] = "emu3"
    released: ClassVar[str] = "Emu3 as converted for transformers, for example BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf"
    frozen: ClassVar[tuple[str, ...]] = ("vqmodel",)
    image_loss_weight: ClassVar[float] = 0.5
    untrained: ClassVar[str] = (
        "Editing (a picture and an instruction in, a picture out). Emu3-Chat was trained further to answer about "
        "pictures and not to draw, Emu3-Gen to draw and not to answer; the stage-1 weights are before both."
    )
    picture_tokens: ClassVar[tuple[int, int]] = (64 * 65 + 9, 64 * 65 + 10)
    look_flops: ClassVar[float] = 1.5e13
    code_flops: ClassVar[float] = 1.5e13
    drawing_flops: ClassVar[float] = 3.1e13
    guidance: float = 3.0

    def equip(self, tokenizer: Any, image_processor: Any) -> None:
        super().equip(tokenizer, image_processor)
        config, processor, factor = self.model.config, self.image_processor, self.vq.vision_spatial_factor
        if processor.spatial_factor != factor:
            raise UserError(
                f"preprocessor_config.json has spatial_factor {processor.spatial_factor}, the VQ model of config.json "
                f"has {factor}; expected both of {self.released}"
            )
        processor.max_pixels = processor.min_pixels
        self.grid = (round(math.sqrt(processor.min_pixels) / factor),) * 2
        count, known = config.vq_config.codebook_size, config.vocabulary_map or {}
        self.first_code = self.token("<|visual token 000000|>")
        names = [f"<|visual token {code:06d}|>" for code in range(count)]
        codes = range(self.first_code, self.first_code + count)
        if [known.get(name) for name in names] != list(codes) or known.get(ROW_END) != self.token(ROW_END):
            raise UserError(
                f"config.json's vocabulary_map does not have {ROW_END} and the {count:,} visual tokens where the "
                f"tokenizer has them, these from {self.first_code} on; expected both of {self.released}"
            )
        start, wrapper, stop = (self.token(f"<|image {name}|>") for name in ("start", "token", "end"))
        self.row_end, frame_end = self.token(ROW_END), self.token("<|extra_201|>")
        self._around = start, wrapper, [frame_end, stop]
        self.begin = self._opening(*self.grid)
        self.end = [frame_end, stop, self.eos]
        self.never = [self.pad, self.bos, wrapper, stop, self.row_end, frame_end, *codes]

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.text_model

    def connections(self) -> dict[str, nn.Parameter]:
        """None: a code is a token, and its connections are rows of the embedding and of the head, `released_extras`."""
        return {}

    def frame(self, opening: bool, reads: bool) -> Frame:
        head, system = ([self.bos], SYSTEM) if opening else ([], "")
        return Frame(head, f"{system}USER: ", "", " ASSISTANT:", [])

    def _opening(self, height: int, width: int) -> list[int]:
        start, wrapper, _ = self._around
        return [start, *self.text(f"{height}*{width}"), wrapper]

    def picture(self, pixels: Tensor) -> Conversation:
        told = Conversation()
        height, width = (size // self.vq.vision_spatial_factor for size in pixels.shape[-2:])
        told.read(self._opening(height, width))
        told.read([self.pad] * (height * (width + 1)), IMAGE_READ)
        told.read(self._around[2])
        return told

    def _tokens(self, pixels: Tensor) -> Tensor:
        """A picture's tokens, row by row, each row with its end."""
        sizes = torch.tensor([pixels.shape[-2:]])
        return self.model.model.get_image_tokens(pixels[None].to(next(self.vq.parameters())), sizes).long()

    def look(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        return [self._tokens(picture).cpu() for picture in pixels]

    def code(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        rows, columns = self.grid
        return [self._tokens(picture).view(rows, columns + 1)[:, :-1].flatten() - self.first_code for picture in pixels]

    def decode(self, codes: Tensor) -> Tensor:
        return self.vq.decode(codes.view(-1, *self.grid))

    def filled(self, item: Encoded, read: Tensor | None, codes: Tensor | None) -> Encoded:
        """Both pictures become tokens."""
        item = super().filled(item, None, codes)
        ids = item.ids if read is None else item.ids.masked_scatter(item.positions == IMAGE_READ, read)
        return replace(item, ids=torch.where(item.codes == IGNORED, ids, item.codes + self.first_code))

    def embed(self, ids: Tensor, codes: Tensor, reads: Sequence[Tensor]) -> Tensor:
        return self.embed_tokens(ids)

    def code_embeddings(self, codes: Tensor) -> Tensor:
        return self.embed_tokens(codes + self.first_code)

    def code_logits(self, hidden: Tensor) -> Tensor:
        weight = self.model.lm_head.weight
        count = self.model.config.vq_config.codebook_size
        return F.linear(hidden.to(weight.device), weight[self.first_code : self.first_code + count])

    def without_instruction(self, question: Encoded) -> Encoded:
        """As trained with the prompt left out: the picture begins at once."""
        new = question.ids.new_tensor
        nothing = Encoded(new([self.bos]), new([IGNORED]), new([IGNORED]), new([TEXT_READ]))
        return nothing.before_codes(self.begin)
