"""Emu3 as a backbone: text tokens and image codes share one vocabulary and one head.

    image  <image start> rows*columns <image token> (columns codes, row end) x rows <end of frame> <image end>

is read and written alike. Of an image written, the codes' loss is over the codes only, that of the tokens around them
over all tokens. The image processor's min_pixels gives its size; in generation, size and row ends are inserted and the
model generates the codes only. max_pixels is set to min_pixels, 512 x 512 as released, so that editing, which takes two
images of 64 x 65 tokens, fits into 9,216 positions.

Reference: Emu3, arXiv 2409.18869, which weights the loss of visual tokens by 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import IGNORED, IMAGE_READ, TEXT_READ, CodedInputs, PromptTemplate, SequenceBuilder
from cnext.errors import UserError
from cnext.image_files import image_size

SYSTEM = "You are a helpful assistant. "
MOST_RATIO = 200
"""The longest image that the image processor of transformers resizes: its longer side by its shorter one."""
ROW_END = "<|extra_200|>"


class Emu3Backbone(CodedBackbone):
    """Emu3, 8 B, from a folder of weights; text and image codes share one vocabulary."""

    name: ClassVar[str] = "emu3"
    model_class: ClassVar[str] = "Emu3ForConditionalGeneration"
    model_type: ClassVar[str] = "emu3"
    released: ClassVar[str] = "Emu3 as converted for transformers, for example BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf"
    frozen: ClassVar[tuple[str, ...]] = ("vqmodel",)
    image_loss_weight: ClassVar[float] = 0.5
    untrained: ClassVar[str] = (
        "Editing (an image and an instruction in, an image out). Emu3-Chat was trained further to answer about "
        "images and not to generate them, Emu3-Gen to generate images and not to answer; the stage-1 weights are from "
        "before both."
    )
    picture_tokens: ClassVar[tuple[int, int]] = (64 * 65 + 9, 64 * 65 + 10)
    read_flops: ClassVar[float] = 1.5e13
    write_flops: ClassVar[float] = 1.5e13
    drawing_flops: ClassVar[float] = 3.1e13
    guidance: float = 3.0

    def set_processors(self, tokenizer: Any, image_processor: Any) -> None:
        super().set_processors(tokenizer, image_processor)
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
        self.begin_image = self._opening(*self.grid)
        self.end_image = [frame_end, stop, self.eos_id]
        self.banned_ids = [self.pad_id, self.bos_id, wrapper, stop, self.row_end, frame_end, *codes]

    @classmethod
    def unmet_need(cls, size: tuple[int, int]) -> str:
        if max(size) <= MOST_RATIO * min(size):
            return ""
        return f"of which {cls.name} reads none with one side over {MOST_RATIO} times the other"

    def shape_read(self, path: Path) -> tuple[int, int]:
        from transformers.models.emu3.image_processing_emu3 import smart_resize

        width, height = image_size(path)
        processor = self.image_processor
        return smart_resize(height, width, processor.spatial_factor, processor.min_pixels, processor.max_pixels)

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.text_model

    def template(self, first: bool, reads: bool) -> PromptTemplate:
        prefix, system = ([self.bos_id], SYSTEM) if first else ([], "")
        return PromptTemplate(prefix, f"{system}USER: ", "", " ASSISTANT:", [])

    def _opening(self, height: int, width: int) -> list[int]:
        start, wrapper, _ = self._around
        return [start, *self.text_ids(f"{height}*{width}"), wrapper]

    def image_sequence(self, pixels: Tensor) -> SequenceBuilder:
        sequence = SequenceBuilder()
        height, width = (size // self.vq.vision_spatial_factor for size in pixels.shape[-2:])
        sequence.add_context(self._opening(height, width))
        sequence.add_context([self.pad_id] * (height * (width + 1)), IMAGE_READ)
        sequence.add_context(self._around[2])
        return sequence

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Tokens (rows * (columns + 1),) of an image, each row with its end."""
        sizes = torch.tensor([pixels.shape[-2:]])
        return self.model.model.get_image_tokens(pixels[None].to(next(self.vq.parameters())), sizes).long()

    def encode_read(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        return [self._tokens(image).cpu() for image in pixels]

    def encode_written(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        rows, columns = self.grid
        return [self._tokens(image).view(rows, columns + 1)[:, :-1].flatten() - self.first_code for image in pixels]

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.vq.decode(codes.view(-1, *self.grid))

    def with_images(self, item: CodedInputs, read: Tensor | None, codes: Tensor | None) -> CodedInputs:
        """Both images become tokens."""
        item = super().with_images(item, None, codes)
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

    def unconditional(self, question: CodedInputs) -> CodedInputs:
        """As trained with the prompt dropped: the image begins at once."""
        new = question.ids.new_tensor
        bare = CodedInputs(new([self.bos_id]), new([IGNORED]), new([IGNORED]), new([TEXT_READ]))
        return bare.with_answer(self.begin_image)
