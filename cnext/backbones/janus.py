"""Janus and Janus-Pro as backbones: images are read by SigLIP and an aligner and written as codes by a head for them.

    reads   aligner(SigLIP(image)), 576 positions
    writes  begin-of-image, then 24 x 24 codes, with input generation_aligner(generation_embeddings(code)) and output
            generation_head; transformers' class trains neither

Editing is both in one sequence, which the released code does not support and the released weights were not trained on.
The prompt is the released one: a system message where an image is read, none elsewhere, and the speakers' names of the
weights: <|User|> and <|Assistant|> for Janus-Pro, User and Assistant for Janus-1.3B.

Reference: Janus, arXiv 2410.13848; Janus-Pro, arXiv 2501.17811. Both add up the losses of text and codes unweighted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import (
    IGNORED,
    IMAGE_READ,
    IMAGE_WRITTEN,
    TEXT_READ,
    CodedInputs,
    PromptTemplate,
    SequenceBuilder,
)
from cnext.backbones.folders import chat_template
from cnext.backbones.sampling import CodeSampling
from cnext.errors import UserError, unknown

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
TEMPLATES = ("auto", "pro", "1.3b")
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
)


class JanusBackbone(CodedBackbone):
    """Janus and Janus-Pro, 1 B or 7 B, from a folder of weights; reads by SigLIP and writes codes."""

    name: ClassVar[str] = "janus"
    model_class: ClassVar[str] = "JanusForConditionalGeneration"
    model_type: ClassVar[str] = "janus"
    released: ClassVar[str] = (
        "Janus or Janus-Pro as converted for transformers, for example deepseek-community/Janus-Pro-1B"
    )
    frozen: ClassVar[tuple[str, ...]] = ("vision_model", "vqmodel")
    connection_names: ClassVar[tuple[str, ...]] = tuple(
        f"model.model.{part}." for part in ("aligner", "generation_embeddings", "generation_aligner", "generation_head")
    )
    image_loss_weight: float = 1.0
    untrained: ClassVar[str] = (
        "Editing (an image and an instruction in, an image out), and beginning an image unasked: the released "
        "prompts put the begin-of-image token there."
    )
    picture_tokens: ClassVar[tuple[int, int]] = (576 + 2, 576 + 1)
    read_flops: ClassVar[float] = 3.8e11
    write_flops: ClassVar[float] = 3.1e11
    drawing_flops: ClassVar[float] = 5.7e11
    sampling: CodeSampling = CodeSampling()
    guidance: float = 5.0
    pro: bool = True
    """Whether prompts have Janus-Pro's names of the speakers; False: those of Janus-1.3B."""

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
        template: str = "auto",
        sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        guidance: float = 5.0,
        begins_images: bool = False,
    ) -> JanusBackbone:
        """The pretrained model, frozen.

        Args:
            template: of prompts, "pro" or "1.3b"; "auto": as the folder's chat template has it, and "1.3b" where the
                tokenizer lacks Janus-Pro's tokens.
            sample, temperature, top_k: see `CodeSampling`.  guidance, begins_images: see `CodedBackbone`.

        Raises:
            UserError: an option out of range, and as `load_parts`.
        """
        if template not in TEMPLATES:
            raise unknown("template of janus", template, TEMPLATES)
        sampling = cls.check_sampling(sample, temperature, top_k, guidance)
        backbone = super().load(device, weights, dtype=dtype, device_map=device_map, checkpointing=checkpointing)
        assert isinstance(backbone, cls)
        assert weights is not None, "without a folder nothing is loaded"
        backbone.sampling, backbone.guidance, backbone.begins_images = sampling, guidance, begins_images
        backbone.pro = backbone._is_pro(weights) if template == "auto" else template == "pro"
        if backbone.pro:
            # Names a token that is missing before anything is prepared.
            backbone.template(True, False, False)
        return backbone

    def _is_pro(self, weights: Path) -> bool:
        """Whether a folder is of Janus-Pro. Warns where the folder's name says otherwise."""
        written = chat_template(weights)
        pro = USER in (self.vocabulary if written is None else written)
        if pro and "janus-1.3b" in str(weights.resolve()).lower():
            warnings.warn(
                f"{weights} is named as Janus-1.3B but has Janus-Pro's chat template, which transformers' conversion "
                "writes for both; prompts are Janus-Pro's: give --backbone-options template=1.3b, or template=pro to "
                "confirm",
                stacklevel=3,
            )
        return pro

    def set_processors(self, tokenizer: Any, image_processor: Any) -> None:
        super().set_processors(tokenizer, image_processor)
        config, size = self.model.config, self.image_processor.size["height"]
        rows, seen = config.vq_config.num_patches, config.vision_config.num_image_tokens
        if seen != rows**2:
            raise UserError(
                f"config.json gives an image {seen} positions, but {rows} x {rows} patches; expected that of "
                f"{self.released}"
            )
        if size != config.vision_config.image_size:
            raise UserError(
                f"preprocessor_config.json gives images of {size} pixels, config.json expects "
                f"{config.vision_config.image_size}; expected both of {self.released}"
            )
        self.grid = rows, rows
        self.image_token = config.image_token_id
        self.begin_image = [self.token("<begin_of_image>")]
        self.end_of_image = self.token("<end_of_image>")
        if self.token("<image_placeholder>") != self.image_token:
            raise UserError(
                f"the tokenizer's <image_placeholder> is {self.token('<image_placeholder>')}, config.json's "
                f"image_token_id {self.image_token}; expected both of {self.released}"
            )
        self.banned_ids = [self.pad_id, self.bos_id, self.image_token, self.end_of_image]

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    def template(self, first: bool, reads: bool, draws: bool) -> PromptTemplate:
        bos, system = ([self.bos_id], SYSTEM if reads else "") if first else ([], "")
        if not self.pro:
            return PromptTemplate(bos, f"{system}User: ", "\n", "\n\nAssistant:", [])
        prefix = [*bos, *self.text_ids(system), self.token(USER)]
        return PromptTemplate(prefix, ": ", "\n", "\n\n", [self.token(ASSISTANT), *self.text_ids(":")])

    def image_sequence(self, pixels: Tensor) -> SequenceBuilder:
        sequence = SequenceBuilder()
        sequence.add_context(self.begin_image)
        sequence.add_context([self.image_token] * self.model.config.vision_config.num_image_tokens, IMAGE_READ)
        sequence.add_context([self.end_of_image])
        return sequence

    def encode_read(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """(576, width) each, before the aligner, which may be trained."""
        if not pixels:
            return []
        parameter = next(self.model.model.vision_model.parameters())
        return list(self.model.model.vision_model(torch.stack(list(pixels)).to(parameter)).last_hidden_state)

    def encode_written(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        if not pixels:
            return []
        latents = self.vq.quant_conv(self.vq.encoder(torch.stack(list(pixels)).to(next(self.vq.parameters()))))
        return list(self.vq.quantize(latents)[2].view(len(pixels), self.tokens))

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.vq.decode(codes)

    def embed(self, ids: Tensor, codes: Tensor, reads: Sequence[Tensor]) -> Tensor:
        embeddings = self.embed_tokens(ids)
        if reads:
            features = self.model.model.aligner(torch.stack(list(reads))).to(embeddings)
            embeddings = embeddings.masked_scatter((ids == self.image_token)[..., None], features)
        written = codes != IGNORED
        if written.any():
            embeddings = embeddings.masked_scatter(
                written[..., None], self.code_embeddings(codes[written]).to(embeddings)
            )
        return embeddings

    def code_embeddings(self, codes: Tensor) -> Tensor:
        return self.model.prepare_embeddings_for_image_generation(codes)

    def code_logits(self, hidden: Tensor) -> Tensor:
        return self.model.model.generation_head(hidden)

    def unconditional(self, question: CodedInputs) -> CodedInputs:
        """As released: all tokens but the first and the last are replaced by padding, which is attended to."""
        ids, positions = torch.full_like(question.ids, self.pad_id), torch.full_like(question.positions, TEXT_READ)
        ids[0], ids[-1], positions[-1] = self.bos_id, self.begin_image[-1], IMAGE_WRITTEN
        return replace(question, ids=ids, positions=positions, read=None)
