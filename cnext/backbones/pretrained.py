"""Base class of backbones that are a transformers model in a folder of weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from cnext.backbones.base import Backbone
from cnext.backbones.folders import check_config, check_folder, load_parts
from cnext.errors import UserError

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear layers of a decoder that is built as LLaMA."""


def checkpoint_activations(model: Any) -> None:
    """Enables activation checkpointing in a transformers model, under the name that its version has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


class PretrainedBackbone(Backbone):
    """A transformers model from a folder that contains a decoder with LLaMA's layer names."""

    targets: ClassVar[tuple[str, ...]] = LLAMA_LINEARS
    model_class: ClassVar[str]
    """Class of transformers."""
    model_type: ClassVar[str]
    """``model_type`` in config.json."""
    released: ClassVar[str]
    """What the folder of weights must contain, for error messages."""
    frozen: ClassVar[tuple[str, ...]]
    """Parts of the model that always stay in evaluation mode."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def set_processors(self, tokenizer: Any, image_processor: Any) -> None:
        """Sets what samples are prepared with. Raises UserError where it does not fit the model."""
        self.tokenizer, self.image_processor = tokenizer, image_processor
        expected, found = f"{self.model_class.partition('For')[0]}ImageProcessor", type(image_processor).__name__
        if not found.startswith(expected):
            raise UserError(f"preprocessor_config.json is of a {found}, expected a {expected}, that of {self.released}")
        self.vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        if len(self.tokenizer) > self.embed_tokens.num_embeddings:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer):,} tokens, the model {self.embed_tokens.num_embeddings:,}; "
                f"expected both of {self.released}"
            )
        self.bos_id, self.eos_id, self.pad_id = (self.token(name) for name in ("bos_token", "eos_token", "pad_token"))

    @classmethod
    def check(cls, weights: Path | None) -> list[Path]:
        return check_folder(weights, cls.model_type, cls.released)

    @classmethod
    def load(
        cls,
        device: torch.device | str = "cpu",
        weights: Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        checkpointing: bool = False,
    ) -> PretrainedBackbone:
        """The pretrained model, frozen. Raises UserError: see `load_parts`."""
        parts = load_parts(weights, cls.model_class, cls.model_type, cls.released, dtype, device_map)
        backbone = cls(parts.model)
        backbone.set_processors(parts.tokenizer, parts.image_processor)
        if checkpointing:
            checkpoint_activations(backbone.language_model)
        backbone.eval()
        return backbone if device_map is not None else backbone.to(device)

    @classmethod
    def meta(cls, weights: Path | None = None) -> PretrainedBackbone:
        """The model of the sizes in the folder's config.json, on the meta device. It cannot prepare samples."""
        folder = check_config(weights, cls.model_type, cls.released)

        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return cls(getattr(transformers, cls.model_class)(config).requires_grad_(False).eval())

    def train(self, mode: bool = True) -> PretrainedBackbone:
        super().train(mode)
        for name in self.frozen:
            getattr(self.model.model, name).eval()
        return self

    @property
    def embed_tokens(self) -> Any:
        """The token embedding of the language model."""
        return self.language_model.embed_tokens

    @property
    def lm_head(self) -> Any:
        """The output head over the vocabulary."""
        return self.model.lm_head

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def token(self, name: str) -> int:
        """Id of a special token, by its text or by the tokenizer's attribute, such as "eos_token".

        Raises UserError where the tokenizer has no such token.
        """
        found = self.vocabulary.get(getattr(self.tokenizer, name, None) or name)
        if found is None:
            raise UserError(
                f"the tokenizer, of {len(self.tokenizer):,} tokens, has no {name}; expected that of {self.released}: "
                "copy its tokenizer.json and tokenizer_config.json"
            )
        return found

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text. A special token's name in it is tokenized as its letters."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def released_extras(self) -> dict[str, nn.Parameter]:
        inside = {id(parameter) for parameter in self.language_model.parameters()}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("model.lm_head.")
            or (id(parameter) in inside and any("norm" in part or part == "embed_tokens" for part in name.split(".")))
        }

    def no_autocast(self) -> AbstractContextManager[object]:
        """Context in which the frozen parts compute in their parameters' dtype."""
        return torch.autocast(self.device.type, enabled=False)
