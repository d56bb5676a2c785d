"""SEED-X as a backbone.

Images are read as views of 64 tokens each, which the input resampler makes of the frozen encoder's features. They are
written as 64 tokens, whose last hidden states the output resampler regresses to the pooled features of the target.

Reference: SEED-X, arXiv 2404.14396; Continual-NExT, arXiv 2602.18055, its released code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone, Output
from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN
from cnext.backbones.pretrained import LLAMA_LINEARS, checkpoint_activations
from cnext.backbones.seed_x import encoding, generation, loading
from cnext.backbones.seed_x.anyres import patch_features
from cnext.backbones.seed_x.drawing import Drawing
from cnext.backbones.seed_x.encoding import SeedXInputs, padded
from cnext.backbones.seed_x.folder import Released, weight_files
from cnext.backbones.seed_x.resampler import Resampler
from cnext.backbones.seed_x.sizes import PATCH_FEATURES, PUBLISHED_LLM, SIDE, TOKENS, VisionSizes
from cnext.backbones.seed_x.tokenizer import END, PAD, Tokenizer
from cnext.backbones.seed_x.vision import VisualEncoder, pooled
from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

BATCH = 16
"""Samples per forward pass without gradient."""


class SeedX(Backbone):
    """SEED-X-I, 17 B, the paper's, from a folder of weights; reads images in tiles and writes them by SDXL.

    13.0 B parameters of LLaMA-2, 1.9 B of the visual encoder, and 0.2 B between the two.

    Args:
        config: a transformers.LlamaConfig.
        vision: sizes of the visual encoder.
        tokenizer: None for a model whose parameters are only counted: it cannot prepare samples.
        drawing: the de-tokenizer; None: images written are not decoded to pixels.
        end_every_turn: whether every answer of a conversation is followed by a supervised </s>. As released only the
            last is, while tests ask a single question.
        max_length: tokens that a conversation is truncated to.
    """

    name: ClassVar[str] = "seed-x"
    targets: ClassVar[tuple[str, ...]] = LLAMA_LINEARS
    connection_names: ClassVar[tuple[str, ...]] = ("input_resampler.", "output_resampler.", "patch_pos_embed")
    picture_tokens: ClassVar[tuple[int, int]] = (3 * (TOKENS + 2), TOKENS + 2)
    drawing_flops: ClassVar[float] = 6e14
    stop_ids: tuple[int, ...] = (END,)
    pad_id: int = PAD

    def __init__(
        self,
        config: Any,
        vision: VisionSizes,
        tokenizer: Tokenizer | None = None,
        drawing: Drawing | None = None,
        *,
        end_every_turn: bool = False,
        max_length: int = 880,
    ) -> None:
        from transformers import LlamaForCausalLM

        super().__init__()
        self.tokenizer: Any = tokenizer  # None on the meta device alone
        self.drawing = drawing
        self.end_every_turn, self.max_length = end_every_turn, max_length
        self.llm = LlamaForCausalLM(config)
        self.vit = VisualEncoder(vision)
        hidden = config.hidden_size
        self.input_resampler = Resampler(TOKENS, hidden, vision.output)
        self.output_resampler = Resampler(TOKENS, vision.output, hidden)
        self.patch_pos_embed = nn.Parameter(torch.zeros(PATCH_FEATURES, hidden))
        self._blank: Tensor | None = None

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
        end_every_turn: bool = False,
        max_length: int = 880,
        edit_stage: str = "first",
        resolution: int | None = None,
        steps: int = 50,
        noise: str = "cpu",
    ) -> SeedX:
        """The released model, frozen, from the folder that `cnext.backbones.seed_x.folder` describes.

        A folder without the de-tokenizer is loaded with a warning that says what is missing, and `require_drawing`
        raises.

        Args:
            end_every_turn, max_length: see the class.
            edit_stage: de-tokenizer for images with a source: "first", as in the paper's evaluation, or "second".
            resolution: side of images written, in pixels; None: 1024.  steps: of denoising.
            noise: of denoising: drawn on the "cpu", the same everywhere, or on the "device", as by the authors.
        """
        parts, place = loading.read_parts(weights), torch.device(device)
        assert weights is not None, "read_parts refuses None"
        drawing = Drawing(weights, edit_stage, resolution, steps, place, dtype, noise)
        if missing := drawing.missing():
            warnings.warn(missing, stacklevel=2)
        with torch.device("meta"):
            model = cls(
                parts.config,
                parts.vision,
                parts.tokenizer,
                drawing,
                end_every_turn=end_every_turn,
                max_length=max_length,
            ).requires_grad_(False)
        agent = nn.ModuleDict({"input_resampler": model.input_resampler, "output_resampler": model.output_resampler})
        agent.register_parameter("patch_pos_embed", model.patch_pos_embed)
        loading.load_weights(parts, model.llm, model.vit, agent, place, dtype, device_map)
        model.patch_pos_embed = agent.get_parameter("patch_pos_embed")
        if checkpointing:
            checkpoint_activations(model.llm)
        return model.requires_grad_(False).eval()

    @classmethod
    def meta(cls, weights: Path | None = None) -> SeedX:
        """The model on the meta device, with the published sizes, which all released models have."""
        with torch.device("meta"):
            return cls(loading.llama_config(PUBLISHED_LLM), VisionSizes()).requires_grad_(False).eval()

    def encoding_flops(self, task: Task) -> float:
        """Two operations per parameter and patch, and those of attention, for two tiles and the whole image; where an
        image is written, for the whole of each."""
        whole = "image" in task.writes
        seen = ("image" in task.reads) * (1 if whole else 3) + whole
        patches = (SIDE // self.vit.conv1.kernel_size[0]) ** 2
        blocks: Any = self.vit.transformer["resblocks"]
        attention = 4 * patches * patches * self.vit.conv1.out_channels * len(blocks)
        return seen * (2.0 * patches * sum(p.numel() for p in blocks.parameters()) + attention)

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        parts = Released.find(weights)
        return [*weight_files(parts.llm), parts.agent, parts.vision]

    @classmethod
    def missing_to_draw(cls, weights: Path | None) -> str:
        assert weights is not None, "`check` comes first"
        return Drawing(weights, "first", None, 1, torch.device("cpu"), torch.float32).missing()

    @property
    def language_model(self) -> nn.Module:
        return self.llm.model

    @property
    def lm_head(self) -> nn.Module:
        """The output head over the vocabulary."""
        return self.llm.lm_head

    @property
    def banned_ids(self) -> list[int]:
        """Tokens that only follow ``<img>``."""
        return self.tokenizer.picture(1)[1:]

    def released_extras(self) -> dict[str, nn.Parameter]:
        ends = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
        return {n: p for n, p in self.named_parameters() if n.startswith("llm.") and n.endswith(ends)}

    def require_drawing(self) -> None:
        if self.drawing is None or (missing := self.drawing.missing()):
            raise UserError(missing if self.drawing else "this model was constructed without a de-tokenizer")
        self.drawing.check_files()

    def prepare(self, sample: Sample) -> SeedXInputs:
        """The sample with pixels in place of features."""
        options = {"end_every_turn": self.end_every_turn, "max_length": self.max_length}
        return encoding.prepare(self.tokenizer, sample, **options)

    def check_length(self, sample: Sample) -> None:
        """A question alone may have any length."""
        if sample.turns[0].answer or sample.target_image:
            options = {"end_every_turn": self.end_every_turn, "max_length": self.max_length}
            encoding.check_length(self.tokenizer, sample, **options)

    def length(self, sample: Sample) -> int:
        return encoding.length(self.tokenizer, sample, end_every_turn=self.end_every_turn)

    def encode_prepared(self, prepared: Sequence[SeedXInputs]) -> list[SeedXInputs]:
        return encoding.encode(self.vit, prepared)

    def inputs(self, ids: Tensor, roles: Tensor, items: Sequence[SeedXInputs]) -> Tensor:
        """Input embeddings (B, L, hidden) of ids and roles, (B, L) both; sets `positions`.

        items: the samples, whose images are read.
        """
        embeddings = self.llm.model.embed_tokens(ids)
        features = [item.features for item in items if item.features is not None]
        if features:
            places = [item.centres for item in items if item.centres is not None]
            tokens = self.input_resampler(torch.cat(features))
            parts = tokens.split([len(each) for each in features])
            spread = [part.expand(len(place), -1, -1) for part, place in zip(parts, places, strict=True)]
            centres = patch_features(torch.cat(places)).to(self.patch_pos_embed)
            tokens = torch.cat(spread) + (centres @ self.patch_pos_embed)[:, None]
            embeddings = embeddings.masked_scatter((roles == IMAGE_READ)[..., None], tokens.to(embeddings.dtype))
        self.positions = roles
        return embeddings

    def output(self, encoded: Sequence[SeedXInputs]) -> Output:
        ids, labels, roles = padded(encoded, self.device)
        supervised = labels[:, 1:] != IGNORED
        # Attention is causal and padding is on the right: no position that counts sees padding, so no mask is needed.
        embeddings = self.inputs(ids, roles, encoded)
        hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        targets = [item.target.float() for item in encoded if item.target is not None]
        image_pred = hidden.new_empty(0, TOKENS, self.vit.proj.shape[1], dtype=torch.float32)
        if targets:
            image_pred = self.output_resampler(hidden[roles == IMAGE_WRITTEN].unflatten(0, (-1, TOKENS))).float()
        logits = self.lm_head(hidden[:, :-1][supervised]).float()
        image_target = torch.stack(targets) if targets else image_pred
        return Output(logits, labels[:, 1:][supervised], image_pred, image_target)

    def supervised(self, encoded: Sequence[SeedXInputs]) -> tuple[int, int]:
        tokens = sum(int((item.labels[1:] != IGNORED).sum()) for item in encoded)
        return tokens, sum(item.target is not None for item in encoded)

    @torch.no_grad()
    def question_features(self, encoded: Sequence[SeedXInputs]) -> Tensor:
        parts = [torch.empty(0, self.llm.config.hidden_size, device=self.device, dtype=self.llm.dtype)]
        for start in range(0, len(encoded), BATCH):
            items = [item.question for item in encoded[start : start + BATCH]]
            ids, _, roles = padded(items, self.device)
            hidden = self.llm.model(inputs_embeds=self.inputs(ids, roles, items), use_cache=False).last_hidden_state
            parts.append(hidden[range(len(items)), [len(item.ids) - 1 for item in items]])
        return torch.cat(parts)

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        answers: list[Prediction] = []
        for start in range(0, len(samples), BATCH):
            chunk = samples[start : start + BATCH]
            asked = self.encode_prepared([encoding.prepare(self.tokenizer, s, max_length=None) for s in chunk])
            written = self._answers(asked, max_new_tokens)
            images = self._images(chunk, written)
            for index, answer in enumerate(written):
                text, released = self.tokenizer.decode(answer.ids), self.tokenizer.decode_as_released(answer.ids)
                answers.append(Prediction(text, images.get(index), None if released == text else released))
        return answers

    def _answers(self, asked: Sequence[SeedXInputs], max_new_tokens: int) -> list[generation.Answer]:
        ids, mask, roles = generation.padded_prompts([i.ids for i in asked], [i.roles for i in asked], self.device)
        inputs = self.inputs(ids, roles, asked)
        return generation.generate(self, self.tokenizer, inputs, mask, roles, max_new_tokens)

    def _images(self, samples: Sequence[Sample], answers: Sequence[generation.Answer]) -> dict[int, Any]:
        """Images by index of their sample; none without a de-tokenizer, of which `load` has warned."""
        states = {index: answer.states for index, answer in enumerate(answers) if answer.states is not None}
        if not states or self.drawing is None or self.drawing.missing():
            return {}
        features = self.output_resampler(torch.stack(list(states.values())))
        if self._blank is None:
            self._blank = pooled(self.vit.blank())[0]
        sources = [samples[index].image for index in states]
        images = self.drawing.draw(features, self._blank.to(features.dtype), sources)
        return dict(zip(states, images, strict=True))
