"""The tiny dual-to-dual backbone, shaped like SEED-X and small enough for one core.

A frozen visual encoder gives 16 features per picture; a LLaMA decoder reads them through an input projection, and
writes a picture by the token ``<img>`` followed by 16 query positions whose last hidden states an output projection
regresses to the features of the picture wanted. A detokenizer turns features into pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone, Output
from cnext.backbones.decoding import Decoding, greedy
from cnext.backbones.pretrained import checkpoint_activations
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.backbones.tiny.vision import TOKENS, WIDTH, Detokenizer, VisualEncoder, to_image, to_input
from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample
from cnext.tensor_files import read_tensors

WEIGHTS = Path(__file__).parent / "weights.safetensors"
IGNORED = -100
TEXT_READ, IMAGE_READ, TEXT_WRITTEN, IMAGE_WRITTEN = range(4)
"""Rows of cnext.adapters.BRANCH_ROLES."""
BATCH = 100
"""Samples per forward pass where nothing is learnt (encoding and generation)."""


def pixels(path: Path) -> Tensor:
    """An image file as (48, 48, 3) uint8."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(numpy.asarray(image.convert("RGB").resize((48, 48))).copy())


@dataclass(frozen=True)
class Encoded:
    """One sample as the decoder sees it. ids, labels: (L,) int64.  features, target: (16, 64) float32 or None."""

    ids: Tensor
    labels: Tensor
    features: Tensor | None
    target: Tensor | None

    @property
    def question(self) -> Tensor:
        """Ids of the first instruction: all before the first token of its answer."""
        return self.ids[: int((self.labels != IGNORED).nonzero()[0])]


class TinyBackbone(Backbone):
    """The embedded default: about 0.87 M parameters in the decoder and its projections."""

    name: ClassVar[str] = "tiny"
    encodes_ahead: ClassVar[bool] = True
    picture_tokens: ClassVar[tuple[int, int]] = (TOKENS + 2, TOKENS + 1)
    targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.tokenizer = TinyTokenizer()
        hidden = 128
        self.decoder = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=hidden,
                intermediate_size=344,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=512,
                bos_token_id=self.tokenizer["<s>"],
                eos_token_id=self.tokenizer["</s>"],
                pad_token_id=self.tokenizer["<pad>"],
                tie_word_embeddings=False,
            )
        )
        self.encoder = VisualEncoder()
        self.detokenizer = Detokenizer()
        self.input_projection = nn.Linear(WIDTH, hidden)
        self.input_position = nn.Parameter(torch.zeros(TOKENS, hidden))
        self.image_queries = nn.Parameter(torch.randn(TOKENS, hidden) * 0.02)
        self.output_projection = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, WIDTH))

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        return [weights or WEIGHTS]

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
    ) -> TinyBackbone:
        """The pretrained model, frozen; the visual parts stay in float32. Raises UserError for other weights."""
        if device_map is not None:
            raise UserError(f"the tiny backbone is for one device and takes no device map, got {device_map!r}")
        model, file = cls(), weights or WEIGHTS
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in read_tensors(file).items()})
        except (RuntimeError, UserError) as error:
            raise UserError(
                f"--weights {file}: expected those of the tiny backbone, as cnext.pretrain_tiny writes them: {error}\n"
                "leave out --weights for those that come with cnext, or name another --backbone"
            ) from error
        nn.Module.to(model.decoder, dtype)
        if checkpointing:
            checkpoint_activations(model.decoder)
        return model.requires_grad_(False).eval().to(device)

    @classmethod
    def meta(cls, weights: Path | None = None) -> TinyBackbone:
        with torch.device("meta"):
            return cls()

    def connections(self) -> dict[str, nn.Parameter]:
        parts = ("input_projection.", "input_position", "image_queries", "output_projection.")
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(parts)}

    def released_extras(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("decoder.") and ("norm" in name or "embed_tokens" in name or "lm_head" in name)
        }

    @property
    def language_model(self) -> nn.Module:
        return self.decoder.model

    @property
    def device(self) -> torch.device:
        return self.image_queries.device

    def prompt(self, sample: Sample) -> list[int]:
        """Ids of the first instruction: <s> [inst] <img> 16 <patch> </img> text [/inst]; no <img> without a picture."""
        token = self.tokenizer
        picture = [token["<img>"], *[token["<patch>"]] * TOKENS, token["</img>"]] if sample.image else []
        return [token["<s>"], token["[inst]"], *picture, *token.encode(sample.turns[0].instruction), token["[/inst]"]]

    def _conversation(self, sample: Sample) -> tuple[list[int], list[int]]:
        token = self.tokenizer
        ids = self.prompt(sample)
        labels = [IGNORED] * len(ids)
        for index, turn in enumerate(sample.turns):
            if index:
                user = [token["\n"], token["[inst]"], *token.encode(turn.instruction), token["[/inst]"]]
                ids += user
                labels += [IGNORED] * len(user)
            answer = token.encode(turn.answer)
            ids += answer
            labels += answer
        if sample.target_image:
            ids += [token["<img>"], *[token["<patch>"]] * TOKENS]
            labels += [token["<img>"], *[IGNORED] * TOKENS]
        else:
            ids.append(token["</s>"])
            labels.append(token["</s>"])
        return ids, labels

    @torch.no_grad()
    def features(self, images: Sequence[Tensor]) -> Tensor:
        """The frozen encoder's features of `pixels`, (N, 16, 64) on the model's device."""
        parts = [
            self.encoder(to_input(torch.stack(list(images[start : start + BATCH])).to(self.device)))
            for start in range(0, len(images), BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0, TOKENS, WIDTH, device=self.device)

    def prepare(self, sample: Sample) -> Encoded:
        """The sample with pixels, (48, 48, 3) uint8, in place of features."""
        read, written = (pixels(path) if path else None for path in (sample.image, sample.target_image))
        return self.assemble(sample, read, written)

    def encode_prepared(self, prepared: Sequence[Encoded]) -> list[Encoded]:
        read = iter(self.features([item.features for item in prepared if item.features is not None]))
        written = iter(self.features([item.target for item in prepared if item.target is not None]))
        return [
            replace(
                item,
                features=None if item.features is None else next(read),
                target=None if item.target is None else next(written),
            )
            for item in prepared
        ]

    def assemble(self, sample: Sample, features: Tensor | None, target: Tensor | None) -> Encoded:
        """A sample whose pictures are encoded already: features read and features to write, (16, 64) each or None."""
        ids, labels = self._conversation(sample)
        return Encoded(torch.tensor(ids), torch.tensor(labels), features, target)

    def _embed(
        self, ids: Tensor, features: Sequence[Tensor | None], targets: Sequence[bool], written: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Input embeddings (B, L, hidden), and the mask (B, L) of the query positions that write a picture.

        written: (B, L) bool, the positions from which a token of an answer is read off, or that hold one.
        """
        embeddings = self.decoder.model.embed_tokens(ids)
        slots = ids == self.tokenizer["<patch>"]
        ordinal = slots.cumsum(1)
        reads = torch.tensor([feature is not None for feature in features], device=ids.device)
        read_slots = slots & reads[:, None] & (ordinal <= TOKENS)
        write_slots = slots & ~read_slots
        stacked = [feature for feature in features if feature is not None]
        if stacked:
            inputs = self.input_projection(torch.stack(stacked)) + self.input_position
            embeddings = embeddings.masked_scatter(read_slots[..., None], inputs.to(embeddings))
        if any(targets):
            queries = self.image_queries.repeat(sum(targets), 1)
            embeddings = embeddings.masked_scatter(write_slots[..., None], queries.to(embeddings))
        positions = torch.full_like(ids, TEXT_READ)
        for mask, role in ((written, TEXT_WRITTEN), (read_slots, IMAGE_READ), (write_slots, IMAGE_WRITTEN)):
            positions = positions.masked_fill(mask, role)
        self.positions = positions
        return embeddings, write_slots

    def output(self, encoded: Sequence[Encoded]) -> Output:
        pad = nn.utils.rnn.pad_sequence
        ids = pad([item.ids for item in encoded], True, self.tokenizer["<pad>"]).to(self.device)
        labels = pad([item.labels for item in encoded], True, IGNORED).to(self.device)
        targets = [item.target for item in encoded if item.target is not None]
        supervised = labels[:, 1:] != IGNORED
        written = (labels != IGNORED) | nn.functional.pad(supervised, (0, 1))
        embeddings, write_slots = self._embed(
            ids, [item.features for item in encoded], [item.target is not None for item in encoded], written
        )
        # Causal attention and padding on the right: no position that counts sees a padded one, so no mask is needed.
        hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        drawn = hidden.new_empty(0, TOKENS, WIDTH)
        if targets:
            drawn = self.output_projection(hidden[write_slots].float()).unflatten(0, (-1, TOKENS))
        wanted = torch.stack(targets) if targets else drawn
        return Output(
            self.decoder.lm_head(hidden[:, :-1][supervised]).float(), labels[:, 1:][supervised], drawn, wanted
        )

    def supervised(self, encoded: Sequence[Encoded]) -> tuple[int, int]:
        tokens = sum(int((item.labels[1:] != IGNORED).sum()) for item in encoded)
        return tokens, sum(item.target is not None for item in encoded)

    @torch.no_grad()
    def question_features(self, encoded: Sequence[Encoded]) -> Tensor:
        parts = []
        for start in range(0, len(encoded), BATCH):
            chunk = encoded[start : start + BATCH]
            prompts = [item.question for item in chunk]
            ids = nn.utils.rnn.pad_sequence(prompts, True, self.tokenizer["<pad>"]).to(self.device)
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
            written = torch.arange(ids.shape[1], device=self.device) == last[:, None]
            embeddings, _ = self._embed(ids, [item.features for item in chunk], [False] * len(chunk), written)
            hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            parts.append(hidden[torch.arange(len(chunk), device=self.device), last])
        return torch.cat(parts) if parts else torch.empty(0, self.image_queries.shape[1], device=self.device)

    def _read(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        """The features of the picture that each sample reads."""
        read = iter(self.features([pixels(sample.image) for sample in samples if sample.image]))
        return [next(read) if sample.image else None for sample in samples]

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        answers: list[Prediction] = []
        for start in range(0, len(samples), BATCH):
            answers += self._generate(samples[start : start + BATCH], max_new_tokens)
        return answers

    def _generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        token = self.tokenizer
        prompts = [self.prompt(sample) for sample in samples]
        features = self._read(samples)
        written = self._greedy(prompts, features, max_new_tokens)
        images: dict[int, Tensor] = {}
        drawing = [index for index, ids in enumerate(written) if ids and ids[-1] == token["<img>"]]
        if drawing:
            pictures = self._draw(
                [prompts[i] for i in drawing], [written[i] for i in drawing], [features[i] for i in drawing]
            )
            images = dict(zip(drawing, pictures, strict=True))
        return [
            Prediction(token.decode(ids), images[index].cpu().numpy() if index in images else None)
            for index, ids in enumerate(written)
        ]

    def _greedy(self, prompts: list[list[int]], features: list[Tensor | None], max_new_tokens: int) -> list[list[int]]:
        """The most likely token after another, until </s> (dropped) or <img> (kept)."""
        token, device = self.tokenizer, self.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[token["<pad>"]] * (longest - len(p)) + p for p in prompts], device=device)
        last = torch.arange(longest, device=device).expand_as(ids) == longest - 1
        inputs, _ = self._embed(ids, features, [False] * len(prompts), last)
        assert self.positions is not None, "_embed sets them"
        written = greedy(
            Decoding(self, inputs, (ids != token["<pad>"]).long(), self.positions),
            self.decoder.lm_head,
            self.decoder.model.embed_tokens,
            stops=(token["</s>"], token["<img>"]),
            never=[token["<pad>"], token["<s>"], token["<patch>"]],
            pad=token["<pad>"],
            max_new_tokens=max_new_tokens,
        )
        return [[index for index in row if index != token["</s>"]] for row in written]

    def _draw(self, prompts: list[list[int]], answers: list[list[int]], features: list[Tensor | None]) -> Tensor:
        """Pictures for answers that end in <img>, (N, 48, 48, 3) uint8: one pass over the 16 queries after it."""
        slots = [self.tokenizer["<patch>"]] * TOKENS
        sequences = [torch.tensor(prompt + answer + slots) for prompt, answer in zip(prompts, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence(sequences, True, self.tokenizer["<pad>"]).to(self.device)
        place = torch.arange(ids.shape[1], device=self.device)
        begin = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)[:, None]
        end = torch.tensor([len(sequence) for sequence in sequences], device=self.device)[:, None]
        embeddings, write_slots = self._embed(ids, features, [True] * len(ids), (place >= begin) & (place < end))
        hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        drawn = self.output_projection(hidden[write_slots].float()).unflatten(0, (-1, TOKENS))
        return to_image(self.detokenizer(drawn))
