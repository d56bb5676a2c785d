"""Emu3 as a backbone: text tokens and image codes share one vocabulary and one head.

    image  <image start> rows*columns <image token> (columns codes, row end) x rows <end of frame> <image end>

is read and written alike. A caption alone asks for an image as released, <s> caption <image start>; all else is asked
in a conversation. Of an image written, the codes' loss is over the codes only, that of the tokens around them over all
tokens; with loss="released" that of the codes is over all tokens, and there is no other. The image processor's
min_pixels gives its size; in generation, size and row ends are inserted and the model generates the codes only.
max_pixels is set to min_pixels, 512 x 512 as released, so that editing, which takes two images of 64 x 65 tokens, fits
into 9,216 positions.

Reference: Emu3, arXiv 2409.18869, which weights the loss of visual tokens by 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import IGNORED, IMAGE_READ, CodedInputs, PromptTemplate, SequenceBuilder
from cnext.backbones.sampling import CodeSampling
from cnext.errors import UserError, unknown
from cnext.image_files import image_size

LOSSES = ("codes", "released")
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""Of the released script."""
_REQUEST = re.compile(r"\A(\s*(please )?generate (an|the) image\s*[:.])+", re.IGNORECASE)
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
    image_loss_weight: float = 0.5
    untrained: ClassVar[str] = (
        "Editing (an image and an instruction in, an image out), and beginning an image unasked: the released prompts "
        "begin it. Emu3-Chat was trained further to answer about "
        "images and not to generate them, Emu3-Gen to generate images and not to answer; the stage-1 weights are from "
        "before both."
    )
    picture_tokens: ClassVar[tuple[int, int]] = (64 * 65 + 9, 64 * 65 + 10)
    read_flops: ClassVar[float] = 1.5e13
    write_flops: ClassVar[float] = 1.5e13
    drawing_flops: ClassVar[float] = 3.1e13
    sampling: CodeSampling = CodeSampling(top_k=2048)
    guidance: float = 3.0
    negative_prompt: str = NEGATIVE_PROMPT
    """What guidance leads away from; "": an image of nothing in particular."""
    positive_prompt: str = ""
    """Text after each caption of an image to generate."""
    over_vocabulary: bool = False
    """Whether the loss of codes is over the whole vocabulary."""

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
        loss: str = "codes",
        sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 2048,
        guidance: float = 3.0,
        negative_prompt: str = NEGATIVE_PROMPT,
        positive_prompt: str = "",
        begins_images: bool = False,
    ) -> Emu3Backbone:
        """The pretrained model, frozen.

        Args:
            loss: of images: "codes", cross-entropy of codes over the codes, weighted by 0.5, and of the tokens around
                them; "released", as the released training script: cross-entropy of codes over the whole vocabulary, and
                nothing else, so that the prompt begins the image.
            sample, temperature, top_k: see `CodeSampling`.  guidance, begins_images: see `CodedBackbone`.
            negative_prompt, positive_prompt: see the class.

        Raises:
            UserError: an option out of range, and as `load_parts`.
        """
        if loss not in LOSSES:
            raise unknown("loss of emu3", loss, LOSSES)
        sampling, released = cls.check_sampling(sample, temperature, top_k, guidance), loss == "released"
        backbone = super().load(device, weights, dtype=dtype, device_map=device_map, checkpointing=checkpointing)
        assert isinstance(backbone, cls)
        backbone.sampling, backbone.guidance = sampling, guidance
        backbone.negative_prompt, backbone.positive_prompt = negative_prompt, positive_prompt
        backbone.begins_images = begins_images or released
        if released:
            backbone.over_vocabulary, backbone.supervises_structure, backbone.image_loss_weight = True, False, 1.0
        return backbone

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

    def template(self, first: bool, reads: bool, draws: bool) -> PromptTemplate:
        if draws:
            return PromptTemplate([self.bos_id], "", "", "", [])
        prefix, system = ([self.bos_id], SYSTEM) if first else ([], "")
        return PromptTemplate(prefix, f"{system}USER: ", "", ". ASSISTANT:", [])

    def instruction(self, text: str, draws: bool, known: bool) -> str:
        """A caption without the words that ask for its image, as it is alone in the released prompt."""
        if not draws:
            return text.strip()
        return _REQUEST.sub("", text).strip() + ("" if known else self.positive_prompt)

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

    def image_prediction(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        if not self.over_vocabulary:
            return super().image_prediction(hidden, codes)
        return self.lm_head(hidden), codes + self.first_code

    def unconditional(self, question: CodedInputs) -> CodedInputs:
        """The negative prompt in the released form, <s> prompt <image start>."""
        sequence = SequenceBuilder()
        sequence.add_context([self.bos_id, *self.text_ids(self.negative_prompt)])
        return sequence.build(None, None).with_answer(self.begin_image)
