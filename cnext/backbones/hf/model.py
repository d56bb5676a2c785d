"""Any image-text-to-text model or causal language model of transformers as a backbone; text is written, no images.

    text   mean over supervised tokens of CE(model(ids, images)_{t-1}, token_t)

Prompts come from the model's chat template, ids and pixels from its processor, logits from its own forward pass and
answers from its own ``generate``. Nothing here depends on the family, but that its decoder is found by `decoder`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cnext.adapters.bases import is_linear
from cnext.adapters.prompts import prompted
from cnext.backbones.base import Backbone, Output
from cnext.backbones.conversation import IGNORED, IMAGE_READ, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.hf import folder
from cnext.backbones.hf.chat import PLAIN, Chat
from cnext.backbones.pretrained import LLAMA_LINEARS, checkpoint_activations
from cnext.errors import UserError
from cnext.image_files import image_size, open_image
from cnext.regular_files import read_text
from cnext.scoring.base import Prediction
from cnext.tasks.base import ImageNeed, Sample, Task, Turn, any_size

BATCH = 16
"""Samples per forward pass without gradient."""
CONNECTORS = {
    *("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "aligner"),
    *("modality_projection", "image_newline", "vision_projection", "embed_vision", "projector", "vision_resampler"),
}
"""Names of the layers between the visual parts and the language model in the families of transformers."""


@dataclass(frozen=True)
class HfInputs:
    """One sample as the processor gives it.

    fields: arguments of the model's forward pass, a batch of one, on the CPU.
    labels: (L,) int64, the token where it is one of an answer or its end, else IGNORED.
    """

    fields: dict[str, Tensor]
    labels: Tensor

    @property
    def question(self) -> HfInputs:
        """The first instruction alone: everything before the first token of its answer."""
        end, length = int((self.labels != IGNORED).nonzero()[0]), len(self.labels)
        cut = {name: value[:, :end] if _is_row(name, value, length) else value for name, value in self.fields.items()}
        return HfInputs(cut, self.labels[:end])

    def positions(self, image_token: int | None) -> Tensor:
        """(L,) int64, see `Backbone.positions`. The last position of a question alone predicts its answer."""
        holds = self.labels != IGNORED
        written = holds | nn.functional.pad(holds[1:], (0, 1), value=not holds.any())
        read = torch.full_like(self.labels, TEXT_READ)
        if image_token is not None:
            read[self.fields["input_ids"][0] == image_token] = IMAGE_READ
        return read.masked_fill(written, TEXT_WRITTEN)


def _is_row(name: str, value: Tensor, length: int) -> bool:
    """Whether a field has a value for each token: ids, types of ids, a mask."""
    return value.shape == (1, length) and name.endswith(("ids", "mask"))


def decoder(model: Any) -> nn.Module:
    """The language model inside a model of transformers, without its head and the visual parts."""
    found = model.get_decoder()
    # transformers 4 stops at the model that has the decoder beside a vision tower.
    for name in ("language_model", "text_model"):
        found = getattr(found, name, found)
    if found is model or not any(module is model.get_input_embeddings() for module in found.modules()):
        raise UserError(
            f"the language model inside of {type(model).__name__} is not found: expected its get_decoder() to return "
            "the module that has the token embedding, without the head; take another model"
        )
    return found


class HuggingFace(Backbone):
    """Models of transformers that write text: image-text-to-text and causal language models, by their chat template."""

    name: ClassVar[str] = "hf"
    image_loss_weight: ClassVar[float] = 0.0
    untrained: ClassVar[str] = "Writing images: suites with such tasks are refused."
    option_files: ClassVar[tuple[str, ...]] = ("chat_template",)
    picture_tokens: tuple[int, int] = (576, 0)  # type: ignore[misc]

    def __init__(self, model: Any, source: folder.Source) -> None:
        super().__init__()
        self.model, self.source = model, source
        self.targets = self._linears()  # type: ignore[misc]
        accepted = inspect.signature(model.forward).parameters
        self._kept = next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted), None)
        config = model.config
        self.image_token = next(
            (value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None))), None
        )

    def _linears(self) -> tuple[str, ...]:
        """Last parts of the names of all linear layers of the language model; those of LLaMA where it is built so."""
        named = self.language_model.named_modules()
        found = {name.rpartition(".")[2] for name, module in named if is_linear(module)}
        if found.issuperset(LLAMA_LINEARS):
            return LLAMA_LINEARS
        if not found:
            raise UserError(
                f"the language model of {type(self.model).__name__} has no linear layer that could have branches; take "
                "another model"
            )
        return tuple(sorted(found))

    def set_processor(self, processor: Any, system: str = "", chat_template: str = "") -> None:
        """Sets what samples are prepared with. Arguments: see `load`. Raises UserError where they do not fit."""
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        renderer = processor
        if chat_template:
            renderer.chat_template = _template(Path(chat_template))
        self.plain = not getattr(renderer, "chat_template", None) and not getattr(self.tokenizer, "chat_template", None)
        if self.plain and self.reads_images:
            raise UserError(
                f"{self.source.folder} has no chat template, which says where an image goes in a prompt; copy "
                "chat_template.jinja there, or name a file by --backbone-options chat_template=FILE"
            )
        if self.plain:
            renderer.chat_template = PLAIN
        elif not getattr(renderer, "chat_template", None):
            renderer.chat_template = self.tokenizer.chat_template
        self.chat = Chat(renderer, self.tokenizer, self.reads_images, system)
        vocabulary, embedded = len(self.tokenizer), self.model.get_input_embeddings().num_embeddings
        if vocabulary > embedded:
            raise UserError(
                f"{self.source.folder}: the tokenizer has {vocabulary:,} tokens, the model {embedded:,}; expected both "
                "of the same model"
            )
        self._set_generation()
        self._expansions: dict[tuple[int, int], int] = {}

    def _set_generation(self) -> None:
        """Greedy decoding without the penalties of the released generation_config.json, whose end tokens count."""
        from transformers import GenerationConfig

        released, tokenizer = self.model.generation_config, self.tokenizer
        ends = released.eos_token_id if released is not None else None
        ends = ends if isinstance(ends, list | tuple) else [ends]
        ends = [*ends, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(self.chat.end)]
        self.stop_ids = list(dict.fromkeys(int(token) for token in ends if token is not None))
        self.pad_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        ids = {"eos_token_id": self.stop_ids, "pad_token_id": self.pad_id, "bos_token_id": tokenizer.bos_token_id}
        self._greedy = GenerationConfig(do_sample=False, **ids)

    @classmethod
    def modalities(cls, weights: Path | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return folder.find(weights).reads, ("text",)

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        return folder.check(weights)

    @classmethod
    def image_need(cls, weights: Path | None) -> ImageNeed:
        """By the processor: of a blank image of that size."""
        if weights is None or "image" not in folder.find(weights).reads:
            return any_size
        processor = folder.load_processor(folder.find(weights))
        return cache(lambda size: _unprocessable(processor.image_processor, size))

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
        system: str = "",
        chat_template: str = "",
    ) -> HuggingFace:
        """The pretrained model, frozen.

        Args:
            device, weights, dtype, device_map, checkpointing: see `Backbone.load`.
            system: text of a system message before every conversation; "": the template's own, if it has one.
            chat_template: file with a Jinja template to use in place of the model's.

        Raises:
            UserError: no such model, files that are missing or broken, no chat template where images are read,
                or a language model that reads what follows.
        """
        folder.check(weights)
        source = folder.find(weights)
        processor = folder.load_processor(source)
        backbone = cls(folder.load_model(source, dtype, device_map), source)
        backbone.set_processor(processor, system, chat_template)
        if checkpointing:
            checkpoint_activations(backbone.language_model)
        backbone.eval()
        backbone = backbone if device_map is not None else backbone.to(device)
        if not backbone.reads_images:
            folder.check_causal(source.folder, backbone.model)
        return backbone

    @classmethod
    def meta(cls, weights: Path | None = None) -> HuggingFace:
        """The model of the sizes in its configuration, on the meta device. It cannot prepare samples."""
        source = folder.find(weights)
        return cls(folder.empty_model(source), source)

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images beside text."""
        return "image" in self.source.reads

    def train(self, mode: bool = True) -> HuggingFace:
        """Only the language model, which has the branches, is ever in training mode."""
        super().train(False)
        self.training = mode
        self.language_model.train(mode)
        return self

    @property
    def language_model(self) -> nn.Module:
        return decoder(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def connections(self) -> dict[str, nn.Parameter]:
        inside = {id(parameter) for parameter in self.language_model.parameters()}
        found = {
            name: parameter
            for name, parameter in self.named_parameters()
            if id(parameter) not in inside and CONNECTORS.intersection(name.split("."))
        }
        if not found:
            raise UserError(
                f"{type(self.model).__name__} has no layers between visual parts and language model that are known "
                "here; train the branches alone: --trainable branches"
            )
        return found

    def released_extras(self) -> dict[str, nn.Parameter]:
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        kept = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        inside = {id(parameter) for parameter in self.language_model.parameters()}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if id(parameter) in kept or (id(parameter) in inside and ("norm" in name or ".ln_" in name))
        }

    def encoding_flops(self, task: Task) -> float:
        """Two for each parameter beside the language model and position of an image."""
        language = [self.language_model, self.model.get_output_embeddings()]
        inside = {id(parameter) for part in language for parameter in part.parameters()}
        beside = sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in inside)
        return 2.0 * beside * self.picture_tokens[0] * ("image" in task.reads)

    def _processed(self, text: str, sample: Sample) -> dict[str, Tensor]:
        """The processor's output for one text. Raises UserError for an image that it cannot read."""
        image = open_image(sample.image) if sample.image else None
        return self._tokenized(text, image, str(sample.origin or sample.id or sample.image or "a question"))

    def _tokenized(self, text: str, image: Any, what: str) -> dict[str, Tensor]:
        options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": self._adds_special(text)}
        if not self.reads_images:
            found = self.tokenizer([text], **options)
            return {name: found[name] for name in ("input_ids", "attention_mask")}
        try:
            found = self.processor(text=[text], images=None if image is None else [[image]], **options)
        except (ValueError, TypeError, LookupError, ZeroDivisionError, RuntimeError) as error:
            size = "" if image is None else f", an image of {image.width} x {image.height} pixels"
            raise UserError(
                f"{what}{size}: the model's {type(self.processor).__name__} cannot read it: {error}\nleave it out"
            ) from error
        accepted = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in found.items() if name != "token_type_ids" or name in accepted}

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer puts its first token in front, as in transformers' ``apply_chat_template``: of a
        tokenizer never, of a processor where the template does not."""
        begin = self.tokenizer.bos_token
        return self.plain or (self.reads_images and not (begin and text.startswith(begin)))

    def _ids(self, text: str, whole: str) -> list[int]:
        """Ids of a text, tokenized as a part of ``whole``, its image not expanded."""
        return self.tokenizer(text, add_special_tokens=self._adds_special(whole))["input_ids"]

    def _require_readable(self, sample: Sample) -> None:
        if sample.target_image is not None:
            raise UserError(f"sample {sample.origin or sample.id} has an image to write; backbone hf writes text alone")
        if sample.image is not None and not self.reads_images:
            raise UserError(
                f"sample {sample.origin or sample.id} has an image, and {type(self.model).__name__} reads text alone; "
                "leave it out, or take a model that reads images"
            )

    def prepare(self, sample: Sample) -> HfInputs:
        """The sample as the processor gives it; answers with their end tokens are supervised.

        Ids of answers are counted from the end, where the expansion of an image changes nothing.

        Raises:
            UserError: an image that cannot be read, a text with a token that structures conversations, or a sample that
                is longer than the model's context.
        """
        self._require_readable(sample)
        text, answers = self.chat.conversation(sample)
        fields = self._processed(text, sample)
        ids, plain = fields["input_ids"][0], self._ids(text, text)
        self._require_short(sample, len(ids))
        labels, more = torch.full_like(ids, IGNORED), len(ids) - len(plain)
        for begin, end in answers:
            first, last = (_common(self._ids(text[:cut], text), plain) + more for cut in (begin, end))
            labels[first:last] = ids[first:last]
        first = int((labels != IGNORED).nonzero()[0])
        if ids[first:].tolist() != plain[first - more :]:
            raise UserError(
                f"sample {sample.origin or sample.id}: {type(self.processor).__name__} tokenizes the answer in another "
                "way beside an image than alone, which is not supported"
            )
        return HfInputs(fields, labels)

    def check_length(self, sample: Sample) -> None:
        self._require_readable(sample)
        self.chat.check(sample)
        answered = any(turn.answer for turn in sample.turns)
        text = self.chat.conversation(sample).text if answered else self.chat.question(sample)
        count = len(self._ids(text, text))
        if sample.image is not None:
            count += self._expansion(image_size(sample.image))
        self._require_short(sample, count)

    def _expansion(self, size: tuple[int, int]) -> int:
        """Ids that the processor adds for an image of that width and height, found by a blank one."""
        from PIL import Image

        if size not in self._expansions:
            text = self.chat.question(Sample("", (Turn("?"),), Path("image")))
            ids = self._tokenized(text, Image.new("RGB", size), "an image")["input_ids"]
            self._expansions[size] = ids.shape[1] - len(self._ids(text, text))
        return self._expansions[size]

    def _require_short(self, sample: Sample, length: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise UserError(
                f"sample {sample.origin or sample.id} is {length:,} tokens long, the model reads {limit:,} at most: "
                "leave it out, or let preprocessor_config.json give smaller images"
            )

    def encode_prepared(self, prepared: Sequence[HfInputs]) -> list[HfInputs]:
        """The samples as they are: images are encoded in the forward pass, as their connection may be trained."""
        return list(prepared)

    def _batch(self, items: Sequence[HfInputs], side: str = "right") -> dict[str, Tensor]:
        """Arguments of the forward pass of several samples, on the model's device. Sets `positions`.

        Values of tokens are padded, and pixels concatenated; where images have several numbers of tiles, zeros fill the
        rest, as processors do themselves.
        """
        names = dict.fromkeys(name for item in items for name in item.fields)
        batch = {}
        for name in names:
            values = [(item.fields[name], len(item.labels)) for item in items if name in item.fields]
            if all(_is_row(name, value, length) for value, length in values):
                rows = [item.fields.get(name, torch.zeros(1, len(item.labels), dtype=torch.int64))[0] for item in items]
                batch[name] = pad_sequence(rows, True, self.pad_id if name == "input_ids" else 0, side)
            else:
                batch[name] = _concatenated([value for value, _ in values])
                if batch[name].is_floating_point():
                    batch[name] = batch[name].to(self.model.dtype)
        positions = [item.positions(self.image_token) for item in items]
        self.positions = pad_sequence(positions, True, TEXT_READ, side).to(self.device)
        return {name: value.to(self.device) for name, value in batch.items()}

    def output(self, encoded: Sequence[HfInputs]) -> Output:
        batch = self._batch(encoded)
        labels = pad_sequence([item.labels for item in encoded], True, IGNORED)[:, 1:].to(self.device)
        supervised = labels != IGNORED
        kept = supervised.any(0).nonzero()[:, 0]
        options = {self._kept: kept} if self._kept else {}
        logits = self.model(**batch, use_cache=False, **options).logits.to(self.device)
        logits = logits if self._kept else logits[:, kept]
        none = logits.new_empty(0, 1, 1, dtype=torch.float32)
        return Output(logits[supervised[:, kept]].float(), labels[supervised], none, none)

    def supervised(self, encoded: Sequence[HfInputs]) -> tuple[int, int]:
        return sum(int((item.labels[1:] != IGNORED).sum()) for item in encoded), 0

    def _question(self, sample: Sample) -> HfInputs:
        """A sample's first instruction, up to where its answer begins."""
        self._require_readable(sample)
        self.chat.check(sample)
        fields = self._processed(self.chat.question(sample), sample)
        return HfInputs(fields, torch.full_like(fields["input_ids"][0], IGNORED))

    @property
    def _together(self) -> int:
        """Samples of different lengths that may be generated at once. A recurrent state would read the padding."""
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None) or ()
        attends = all("attention" in kind and "linear" not in kind for kind in kinds)
        return BATCH if attends and not getattr(self.model, "_is_stateful", False) else 1

    @torch.no_grad()
    def question_features(self, encoded: Sequence[HfInputs]) -> Tensor:
        embeddings = self.model.get_input_embeddings()
        parts = [torch.empty(0, embeddings.embedding_dim, device=self.device)]
        for start in range(0, len(encoded), BATCH):
            questions = [item.question for item in encoded[start : start + BATCH]]
            batch = self._batch(questions)
            last = torch.tensor([len(question.labels) - 1 for question in questions], device=self.device)
            found = self._hidden_states(batch)
            parts.append(found[torch.arange(len(questions), device=self.device), last].to(parts[0].dtype))
        return torch.cat(parts)

    def _hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """Last hidden states of the language model, (B, L, hidden)."""
        found: list[Tensor] = []
        passed = self.language_model.register_forward_hook(lambda *call: found.append(call[2].last_hidden_state))
        try:
            self.model(**batch, use_cache=False, **({self._kept: 1} if self._kept else {}))
        finally:
            passed.remove()
        return found[0].to(self.device)

    @torch.no_grad()
    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Prediction]:
        answers: list[Prediction] = []
        for start in range(0, len(samples), self._together):
            questions = [self._question(sample) for sample in samples[start : start + self._together]]
            for ids in self._generated(questions, max_new_tokens):
                end = next((index for index, token in enumerate(ids) if token in self.stop_ids), len(ids))
                answers.append(Prediction(self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()))
        return answers

    def _generated(self, questions: Sequence[HfInputs], max_new_tokens: int) -> list[list[int]]:
        """Ids after each question, by the model's own greedy decoding with a key-value cache."""
        batch = self._batch(questions, "left")

        def then(*call: Any) -> None:
            if cached:
                self.positions = torch.full((len(questions), 1), TEXT_WRITTEN, device=self.device)

        # Models that count positions or make masks from the cache would count prompts in it as tokens.
        cached = not prompted(self.language_model)
        # With a cache, each pass after that over the questions is over one written token.
        passed = self.language_model.register_forward_hook(then)
        # Given as an argument, it would be filled in from the released one.
        released, self.model.generation_config = self.model.generation_config, self._greedy
        try:
            found = self.model.generate(**batch, max_new_tokens=max_new_tokens, use_cache=cached)
        finally:
            self.model.generation_config = released
            passed.remove()
        return found[:, batch["input_ids"].shape[1] :].tolist()


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Number of ids with which both begin."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(some), len(others)))


def _concatenated(values: Sequence[Tensor]) -> Tensor:
    """Tensors of one number of dimensions along the first; zeros fill up the others."""
    sides = [max(value.shape[side] for value in values) for side in range(1, values[0].dim())]

    def filled(value: Tensor) -> Tensor:
        if list(value.shape[1:]) == sides:
            return value
        found = value.new_zeros(len(value), *sides)
        found[tuple(slice(size) for size in value.shape)] = value
        return found

    return torch.cat([filled(value) for value in values])


def _template(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--backbone-options chat_template={file}: expected a file with a Jinja template: {error}"
        ) from error


def _unprocessable(image_processor: Any, size: tuple[int, int]) -> str:
    """Why an image processor cannot read an image of that width and height, "" if it can."""
    from PIL import Image

    try:
        image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    except (ValueError, TypeError, LookupError, ZeroDivisionError, RuntimeError) as error:
        return f"which the model's {type(image_processor).__name__} refuses: {error}"
    return ""
