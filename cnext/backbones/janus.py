"""Janus and Janus-Pro: pictures are read through SigLIP and an aligner, and written as codes by a head for these.

    reads   aligner(SigLIP(picture)), 576 positions
    writes  begin-of-image, then 24 x 24 codes: in by generation_aligner(generation_embeddings(code)), out by
            generation_head; transformers' class trains neither

Editing is both in one sequence, which the released code does not do and the released weights have not seen. The prompt
is the released one: a system message where a picture is read, none elsewhere.

Reference: Janus, arXiv 2410.13848; Janus-Pro, arXiv 2501.17811. Both add up the losses of text and codes unweighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN, TEXT_READ, Conversation, Encoded, Frame
from cnext.errors import UserError

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
)


class JanusBackbone(CodedBackbone):
    """``JanusForConditionalGeneration`` with the image loss that it lacks, and with editing."""

    name: ClassVar[str] = "janus"
    model_class: ClassVar[str] = "JanusForConditionalGeneration"
    model_type: ClassVar[str] = "janus"
    released: ClassVar[str] = (
        "Janus or Janus-Pro as converted for transformers, for example deepseek-community/Janus-Pro-1B"
    )
    frozen: ClassVar[tuple[str, ...]] = ("vision_model", "vqmodel")
    image_loss_weight: ClassVar[float] = 1.0
    untrained: ClassVar[str] = (
        "Editing (a picture and an instruction in, a picture out), and beginning a picture unasked: the released "
        "prompts put the begin-of-image token there."
    )
    picture_tokens: ClassVar[tuple[int, int]] = (576 + 2, 576 + 1)
    look_flops: ClassVar[float] = 3.8e11
    code_flops: ClassVar[float] = 3.1e11
    drawing_flops: ClassVar[float] = 5.7e11
    guidance: float = 5.0

    def equip(self, tokenizer: Any, image_processor: Any) -> None:
        super().equip(tokenizer, image_processor)
        config, size = self.model.config, self.image_processor.size["height"]
        rows, seen = config.vq_config.num_patches, config.vision_config.num_image_tokens
        if seen != rows**2:
            raise UserError(
                f"config.json gives a picture {seen} positions, but {rows} x {rows} patches; expected that of "
                f"{self.released}"
            )
        if size != config.vision_config.image_size:
            raise UserError(
                f"preprocessor_config.json gives pictures of {size} pixels, config.json expects "
                f"{config.vision_config.image_size}; expected both of {self.released}"
            )
        self.grid = rows, rows
        self.image_token = config.image_token_id
        self.begin = [self.token("<begin_of_image>")]
        self.end_of_image = self.token("<end_of_image>")
        self.user, self.assistant = self.token("<|User|>"), self.token("<|Assistant|>")
        if self.token("<image_placeholder>") != self.image_token:
            raise UserError(
                f"the tokenizer's <image_placeholder> is {self.token('<image_placeholder>')}, config.json's "
                f"image_token_id {self.image_token}; expected both of {self.released}"
            )
        self.never = [self.pad, self.bos, self.image_token, self.end_of_image]

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def connections(self) -> dict[str, nn.Parameter]:
        """The aligners of both directions, the codes' embeddings, and the head that gives codes."""
        parts = ("aligner", "generation_embeddings", "generation_aligner", "generation_head")
        return {
            n: p for n, p in self.named_parameters() if n.startswith(tuple(f"model.model.{part}." for part in parts))
        }

    def frame(self, opening: bool, reads: bool) -> Frame:
        head = [self.bos, *self.text(SYSTEM if reads else "")] if opening else []
        return Frame([*head, self.user], ": ", "\n", "\n\n", [self.assistant, *self.text(":")])

    def picture(self, pixels: Tensor) -> Conversation:
        told = Conversation()
        told.read(self.begin)
        told.read([self.image_token] * self.model.config.vision_config.num_image_tokens, IMAGE_READ)
        told.read([self.end_of_image])
        return told

    def look(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """(576, width) each, before the aligner, which may be trained."""
        if not pixels:
            return []
        parameter = next(self.model.model.vision_model.parameters())
        return list(self.model.model.vision_model(torch.stack(list(pixels)).to(parameter)).last_hidden_state)

    def code(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        if not pixels:
            return []
        latents = self.vq.quant_conv(self.vq.encoder(torch.stack(list(pixels)).to(next(self.vq.parameters()))))
        return list(self.vq.quantize(latents)[2].view(len(pixels), self.tokens))

    def decode(self, codes: Tensor) -> Tensor:
        return self.vq.decode(codes)

    def embed(self, ids: Tensor, codes: Tensor, reads: Sequence[Tensor]) -> Tensor:
        embeddings = self.embed_tokens(ids)
        if reads:
            features = self.model.model.aligner(torch.stack(list(reads))).to(embeddings)
            embeddings = embeddings.masked_scatter((ids == self.image_token)[..., None], features)
        drawn = codes != IGNORED
        if drawn.any():
            embeddings = embeddings.masked_scatter(drawn[..., None], self.code_embeddings(codes[drawn]).to(embeddings))
        return embeddings

    def code_embeddings(self, codes: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)

    def without_instruction(self, question: Encoded) -> Encoded:
        """As released: every token but the first and the last is padding, which is read."""
        ids, positions = torch.full_like(question.ids, self.pad), torch.full_like(question.positions, TEXT_READ)
        ids[0], ids[-1], positions[-1] = self.bos, self.begin[-1], IMAGE_WRITTEN
        return replace(question, ids=ids, positions=positions, read=None)
