"""The embedded backbone: SEED-X's architecture, small enough for one CPU core.

A frozen visual encoder gives 16 features per image. A LLaMA decoder reads them through an input projection. It writes
an image as the token ``<img>`` followed by 16 query positions; an output projection regresses their last hidden states
to the features of the target image. A de-tokenizer decodes features to pixels. `cnext.backbones.small` is the same in
another size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone, Output
from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.decoding import greedy, pad_left
from cnext.backbones.pretrained import LLAMA_LINEARS, checkpoint_activations
from cnext.backbones.tiny.decoder import Config, Llama, as_transformers
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.backbones.tiny.vision import SIZES, Detokenizer, Sizes, VisualEncoder, to_image, to_input
from cnext.errors import UserError
from cnext.image_files import open_image
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample
from cnext.tensor_files import read_tensors

WEIGHTS = Path(__file__).parent / "weights.safetensors"
BATCH = 100
"""Samples per forward pass without gradient."""
KEPT_BYTES = 2**28
"""Most bytes of encoded images that a model keeps for questions that it is asked again."""
LONGEST = 8192
"""Tokens of a sequence: attention over ten times as many takes gigabytes, and minutes for a sample."""


def pixels(path: Path, side: int = SIZES.side) -> Tensor:
    """An image file as (side, side, 3) uint8."""
    import numpy

    return torch.from_numpy(numpy.array(open_image(path).resize((side, side))))


@dataclass(frozen=True)
class TinyInputs:
    """One sample as model inputs.

    ids, labels: (L,) int64.  features: of the image read.  target: of the image to write. (tokens, width) float32, or
    None; as prepared, (side, side, 3) uint8 pixels. Tiny: 16 tokens of width 64, and a side of 48 pixels.
    """

    ids: Tensor
    labels: Tensor
    features: Tensor | None
    target: Tensor | None

    @property
    def question(self) -> Tensor:
        """Ids of the first instruction: everything before the first token of its answer."""
        return self.ids[: int((self.labels != IGNORED).nonzero()[0])]


class TinyBackbone(Backbone):
    """0.87 M parameters, embedded, shaped like SEED-X; learns six tasks on a CPU in minutes."""

    name: ClassVar[str] = "tiny"
    encodes_ahead: ClassVar[bool] = True
    picture_tokens: ClassVar[tuple[int, int]] = (SIZES.tokens + 2, SIZES.tokens + 1)
    targets: ClassVar[tuple[str, ...]] = LLAMA_LINEARS
    connection_names: ClassVar[tuple[str, ...]] = (
        *("input_projection.", "input_position", "image_queries", "output_projection."),
    )

    sizes: ClassVar[Sizes] = SIZES
    own_weights: ClassVar[Path] = WEIGHTS
    pretraining: ClassVar[str] = "bench/pretrain_tiny.py"

    def __init__(self, tokenizer: TinyTokenizer | None = None) -> None:
        super().__init__()
        self.tokenizer = token = tokenizer or self.new_tokenizer()
        self.pad_id = token["<pad>"]
        self.stop_ids = (token["</s>"], token["<img>"])
        self.banned_ids = (token["<pad>"], token["<s>"], token["<patch>"])
        sizes = self.sizes
        hidden, width = sizes.hidden, sizes.width
        self.decoder = Llama(
            Config(
                vocab_size=len(token),
                hidden_size=hidden,
                intermediate_size=sizes.intermediate,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                max_position_embeddings=512,
                bos_token_id=token["<s>"],
                eos_token_id=token["</s>"],
                pad_token_id=token["<pad>"],
            )
        )
        self.encoder, self.detokenizer = self.new_vision()
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        """Features of the images of questions, see `_features_of`."""
        self.input_projection = nn.Linear(width, hidden)
        self.input_position = nn.Parameter(torch.zeros(sizes.tokens, hidden))
        self.image_queries = nn.Parameter(torch.randn(sizes.tokens, hidden) * 0.02)
        self.output_projection = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    @classmethod
    def new_tokenizer(cls) -> TinyTokenizer:
        """The tokenizer that belongs to the weights."""
        return TinyTokenizer()

    @classmethod
    def new_vision(cls) -> tuple[nn.Module, nn.Module]:
        """Encoder and de-tokenizer with random weights."""
        return VisualEncoder(), Detokenizer()

    @classmethod
    def stored(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state in float32 of what is in a file of weights."""
        return {name: tensor.float() for name, tensor in tensors.items()}

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        return [weights or cls.own_weights]

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
        """The pretrained model, frozen; visual parts stay in float32. Raises UserError for another model's weights."""
        if device_map is not None:
            raise UserError(f"the {cls.name} backbone runs on one device and takes no device map, got {device_map!r}")
        model, file = cls(), weights or cls.own_weights
        try:
            model.load_state_dict(cls.stored(read_tensors(file)))
        except (RuntimeError, UserError) as error:
            raise UserError(
                f"--weights {file}: expected weights of the {cls.name} backbone, from {cls.pretraining}: {error}\n"
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

    def released_extras(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("decoder.") and ("norm" in name or "embed_tokens" in name or "lm_head" in name)
        }

    def outer_model(self) -> Any:
        return as_transformers(self.decoder)

    def logits_model(self) -> Any:
        return self.decoder

    @property
    def language_model(self) -> nn.Module:
        return self.decoder.model

    @property
    def lm_head(self) -> nn.Module:
        """The output head over the vocabulary."""
        return self.decoder.lm_head

    @property
    def device(self) -> torch.device:
        return self.image_queries.device

    def prompt(self, sample: Sample) -> list[int]:
        """Ids of the first instruction: <s> [inst] <img> <patch>... </img> text [/inst]; no <img> without an image."""
        token = self.tokenizer
        image = [token["<img>"], *[token["<patch>"]] * self.sizes.tokens, token["</img>"]] if sample.image else []
        text = token.encode(sample.turns[0].instruction)
        return self._bounded([token["<s>"], token["[inst]"], *image, *text, token["[/inst]"]], sample)

    def _bounded(self, ids: list[int], sample: Sample) -> list[int]:
        if len(ids) > LONGEST:
            raise UserError(
                f"{sample.origin or repr(sample.turns[0].instruction[:60])} has {len(ids):,} tokens, and the "
                f"{self.name} backbone reads at most {LONGEST:,}; shorten the row or leave it out"
            )
        return ids

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
            ids += [token["<img>"], *[token["<patch>"]] * self.sizes.tokens]
            labels += [token["<img>"], *[IGNORED] * self.sizes.tokens]
        else:
            ids.append(token["</s>"])
            labels.append(token["</s>"])
        return ids, labels

    @torch.no_grad()
    def features(self, images: Sequence[Tensor]) -> Tensor:
        """Features (N, tokens, width) of images as `pixels` gives them, by the encoder, on the model's device."""
        parts = [
            self.encoder(to_input(torch.stack(list(images[start : start + BATCH])).to(self.device)))
            for start in range(0, len(images), BATCH)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.sizes.tokens, self.sizes.width, device=self.device)

    def _features_of(self, images: Sequence[Path]) -> Tensor:
        """`features` of image files. Those of a test are asked for after every task, and are encoded once.

        What is kept is of the same files together, as the last bits of a convolution may depend on its batch, of the
        same time of change and size, and of the same weights, device and precision.
        """
        try:
            files = tuple((image, (at := image.stat()).st_mtime_ns, at.st_size) for image in images)
        except OSError:  # Reading them says which, and why.
            return self.features([pixels(image, self.sizes.side) for image in images])
        weights = tuple((p.data_ptr(), p._version) for p in self.encoder.parameters())
        key = (files, weights, self.device, torch.is_autocast_enabled(self.device.type))
        if (kept := self._kept.get(key)) is not None:
            return kept
        found = self.features([pixels(image, self.sizes.side) for image in images])
        # What is asked for in a cycle would push itself out of a memory that drops the oldest.
        if sum(each.nbytes for each in self._kept.values()) + found.nbytes <= KEPT_BYTES:
            self._kept[key] = found
        return found

    def prepare(self, sample: Sample) -> TinyInputs:
        """The sample with pixels in place of features."""
        read, written = (
            pixels(path, self.sizes.side) if path else None for path in (sample.image, sample.target_image)
        )
        return self.assemble(sample, read, written)

    def encode_prepared(self, prepared: Sequence[TinyInputs]) -> list[TinyInputs]:
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

    def assemble(self, sample: Sample, features: Tensor | None, target: Tensor | None) -> TinyInputs:
        """A sample whose images are encoded already. features, target: see `TinyInputs`."""
        ids, labels = self._conversation(sample)
        self._bounded(ids, sample)
        return TinyInputs(torch.tensor(ids), torch.tensor(labels), features, target)

    def _embed(
        self, ids: Tensor, features: Sequence[Tensor | None], targets: Sequence[bool], written: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Input embeddings (B, L, hidden), and the mask (B, L) of the query positions that write an image.

        Args:
            ids: (B, L).  features: of the image that each sample reads, (tokens, width) or None.
            targets: whether each sample writes an image.
            written: (B, L) bool, positions that hold or predict a token of an answer.
        """
        embeddings = self.decoder.model.embed_tokens(ids)
        slots = ids == self.tokenizer["<patch>"]
        ordinal = slots.cumsum(1)
        reads = torch.tensor([feature is not None for feature in features], device=ids.device)
        read_slots = slots & reads[:, None] & (ordinal <= self.sizes.tokens)
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

    def output(self, encoded: Sequence[TinyInputs]) -> Output:
        pad = nn.utils.rnn.pad_sequence
        ids = pad([item.ids for item in encoded], True, self.pad_id).to(self.device)
        labels = pad([item.labels for item in encoded], True, IGNORED).to(self.device)
        targets = [item.target for item in encoded if item.target is not None]
        supervised = labels[:, 1:] != IGNORED
        written = (labels != IGNORED) | nn.functional.pad(supervised, (0, 1))
        embeddings, write_slots = self._embed(
            ids, [item.features for item in encoded], [item.target is not None for item in encoded], written
        )
        # Attention is causal and padding is on the right: no position that counts sees padding, so no mask is needed.
        hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        image_pred = hidden.new_empty(0, self.sizes.tokens, self.sizes.width)
        if targets:
            image_pred = self.output_projection(hidden[write_slots].float()).unflatten(0, (-1, self.sizes.tokens))
        image_target = torch.stack(targets) if targets else image_pred
        logits = self.lm_head(hidden[:, :-1][supervised]).float()
        return Output(logits, labels[:, 1:][supervised], image_pred, image_target)

    def supervised(self, encoded: Sequence[TinyInputs]) -> tuple[int, int]:
        tokens = sum(int((item.labels[1:] != IGNORED).sum()) for item in encoded)
        return tokens, sum(item.target is not None for item in encoded)

    @torch.no_grad()
    def question_features(self, encoded: Sequence[TinyInputs]) -> Tensor:
        return self._of_questions(encoded, lambda hidden, length: hidden[torch.arange(len(hidden)), length - 1])

    @torch.no_grad()
    def question_means(self, encoded: Sequence[TinyInputs]) -> Tensor:
        def mean(hidden: Tensor, length: Tensor) -> Tensor:
            assert self.positions is not None, "_embed sets them"
            text = (self.positions == TEXT_READ) & (torch.arange(hidden.shape[1], device=self.device) < length[:, None])
            return (hidden * text[..., None]).sum(1) / text.sum(1, keepdim=True)

        return self._of_questions(encoded, mean)

    def _of_questions(self, encoded: Sequence[TinyInputs], pooled: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(N, hidden) of first instructions. pooled: of hidden states (B, L, hidden) and lengths (B,), padded right."""
        parts = [torch.empty(0, self.image_queries.shape[1], device=self.device)]
        for start in range(0, len(encoded), BATCH):
            chunk = encoded[start : start + BATCH]
            prompts = [item.question for item in chunk]
            ids = nn.utils.rnn.pad_sequence(prompts, True, self.pad_id).to(self.device)
            length = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
            written = torch.arange(ids.shape[1], device=self.device) == length[:, None] - 1
            embeddings, _ = self._embed(ids, [item.features for item in chunk], [False] * len(chunk), written)
            hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            parts.append(pooled(hidden, length))
        return torch.cat(parts)

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        answers: list[Prediction] = []
        for start in range(0, len(samples), BATCH):
            answers += self._generate(samples[start : start + BATCH], max_new_tokens)
        return answers

    def _generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        prompts = [torch.tensor(self.prompt(sample)) for sample in samples]
        read = iter(self._features_of([sample.image for sample in samples if sample.image]))
        features = [next(read) if sample.image else None for sample in samples]
        ids = pad_left(prompts, self.pad_id, self.device)
        last = torch.arange(ids.shape[1], device=self.device).expand_as(ids) == ids.shape[1] - 1
        inputs, _ = self._embed(ids, features, [False] * len(ids), last)
        assert self.positions is not None, "_embed sets them"
        end, begin_image = self.stop_ids
        written = greedy(self, inputs, (ids != self.pad_id).long(), self.positions, max_new_tokens)
        written = [[token for token in row if token != end] for row in written]
        begun = [index for index, row in enumerate(written) if row and row[-1] == begin_image]
        images: dict[int, Tensor] = {}
        if begun:
            drawn = self._images([prompts[i] for i in begun], [written[i] for i in begun], [features[i] for i in begun])
            images = dict(zip(begun, drawn, strict=True))
        return [
            Prediction(self.tokenizer.decode(row), images[index].cpu().numpy() if index in images else None)
            for index, row in enumerate(written)
        ]

    def _images(
        self, prompts: Sequence[Tensor], answers: Sequence[list[int]], features: Sequence[Tensor | None]
    ) -> Tensor:
        """Images (N, side, side, 3) uint8 of answers that end in <img>, by one pass over the query positions after it.

        Args:
            prompts: (L,) ids each.  answers: ids.  features: of the image that each reads, (tokens, width) or None.
        """
        slots = [self.tokenizer["<patch>"]] * self.sizes.tokens
        sequences = [torch.cat([p, torch.tensor(a + slots)]) for p, a in zip(prompts, answers, strict=True)]
        ids = nn.utils.rnn.pad_sequence(sequences, True, self.pad_id).to(self.device)
        index = torch.arange(ids.shape[1], device=self.device)
        begin = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)[:, None]
        end = torch.tensor([len(sequence) for sequence in sequences], device=self.device)[:, None]
        embeddings, write_slots = self._embed(ids, features, [True] * len(ids), (index >= begin) & (index < end))
        hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return to_image(
            self.detokenizer(self.output_projection(hidden[write_slots].float()).unflatten(0, (-1, self.sizes.tokens)))
        )
