"""Finds and loads a model of transformers and its processor: from a folder, or from one file of GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnext.backbones.folders import LOCAL, check_tensors, read_json, refuse_adapter, require_same_size, weight_files
from cnext.errors import UserError

EXPECTED = (
    "a folder with an image-text-to-text or a causal language model of transformers (config.json, safetensors, "
    "tokenizer and processor), or a .gguf file"
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Source(NamedTuple):
    """Where a model is and what it is.

    folder: with its files.  gguf: name of the file in it, None for a folder of transformers.
    auto: class of transformers that loads it.  reads: "text" and perhaps "image".
    """

    folder: Path
    gguf: str | None
    auto: str
    reads: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``: nothing is downloaded, and no code in the folder is executed."""
        return LOCAL | ({"gguf_file": self.gguf} if self.gguf else {})


@contextmanager
def _as_user_errors(folder: Path) -> Iterator[None]:
    """Turns what transformers raises for broken folders into UserError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (
        *(OSError, TypeError, ValueError, RuntimeError, ImportError, LookupError, AttributeError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder} needs Python code of its own, which is not executed here; expected a model that "
                "transformers has a class for: upgrade transformers, or take one that was converted for it"
            ) from error
        advice = "copy the broken file again, or upgrade transformers where it does not know the model"
        raise UserError(f"{folder} cannot be loaded: {error}\nexpected {EXPECTED}; {advice}") from error


def find(weights: Path | None) -> Source:
    """What is at a path. Reads config.json and no tensors.

    Raises:
        UserError: no folder or file, no model of these kinds, or one that needs code of its own, is quantized, or has
            an adapter beside it.
    """
    if weights is None:
        raise UserError(f"no weights given: expected {EXPECTED}; name it by --weights")
    if not weights.exists():
        raise UserError(f"no folder or file {weights}: expected {EXPECTED}; download it there, or name another")
    refuse_adapter(weights if weights.is_dir() else weights.parent)
    if weights.is_file() or not (weights / "config.json").is_file():
        return _find_gguf(weights)

    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    written = read_json(weights / "config.json")
    with _as_user_errors(weights):
        config = transformers.AutoConfig.from_pretrained(weights, **LOCAL)
    for part in (written, written.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            raise UserError(
                f"{weights} is quantized (quantization_config in config.json), which backbone hf does not load; take "
                "the model in bfloat16 or float32: --precision bfloat16 halves its memory"
            )
    # Those of masked language models, such as BERT, read what follows a token too.
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not encodes and not getattr(config, "is_encoder_decoder", False):
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return Source(weights, None, "AutoModelForImageTextToText", ("text", "image"))
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return Source(weights, None, "AutoModelForCausalLM", ("text",))
    raise UserError(
        f"{weights}/config.json is of model_type {config.model_type!r}, which is no decoder that writes text: "
        f"expected {EXPECTED}"
    )


def _find_gguf(weights: Path) -> Source:
    files = [weights] if weights.is_file() else sorted(weights.glob("*.gguf"))
    if len(files) != 1 or files[0].suffix != ".gguf":
        several = f"{len(files)} .gguf files in {weights}, name one of them" if len(files) > 1 else ""
        raise UserError(f"{several or f'no config.json in {weights}'}: expected {EXPECTED}")
    if find_spec("gguf") is None:
        raise UserError(f"{files[0]} is read by the package gguf, which is not installed; pip install 'cnext[gguf]'")
    return Source(files[0].parent, files[0].name, "AutoModelForCausalLM", ("text",))


def check(weights: Path | None) -> list[Path]:
    """The files of weights. Raises UserError unless every file that the model is loaded from exists."""
    source = find(weights)
    if source.gguf:
        return [source.folder / source.gguf]
    files = weight_files(source.folder)
    for either in (TOKENIZERS, PROCESSORS) if "image" in source.reads else (TOKENIZERS,):
        if not any((source.folder / name).is_file() for name in either):
            raise UserError(f"{source.folder} has no {' or '.join(either)}; copy it from where the weights are")
    return files


def load_processor(source: Source) -> Any:
    """The processor of a model that reads images, the tokenizer of another. Raises UserError where it is broken."""
    import transformers

    if "image" not in source.reads:
        with _as_user_errors(source.folder):
            return transformers.AutoTokenizer.from_pretrained(source.folder, **source.options)
    with _as_user_errors(source.folder):
        processor = transformers.AutoProcessor.from_pretrained(source.folder, **source.options)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"{source.folder} has a {type(processor).__name__} where a processor of text and images was expected; copy "
            f"{' and '.join(PROCESSORS)} from where the weights are"
        )
    return processor


def load_model(source: Source, dtype: torch.dtype, device_map: str | None) -> Any:
    """The model, frozen, in evaluation mode. Raises UserError where a file is broken, or tensors are missing."""
    import transformers

    if not source.gguf:
        require_same_size(source.folder, lambda: empty_model(source))
    with _as_user_errors(source.folder):
        model, loading_info = getattr(transformers, source.auto).from_pretrained(
            source.folder,
            dtype=dtype,
            device_map=device_map,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({} if source.gguf else {"use_safetensors": True}),
            **source.options,
        )
    check_tensors(source.folder, loading_info)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def check_causal(folder: Path, model: Any) -> None:
    """Raises UserError where predictions of a language model depend on tokens after them."""
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=model.get_input_embeddings().weight.device)
    one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # Rounding may depend on the other tokens, as where experts compute theirs together.
    if (one - other).norm() > max(1e-5, 8 * torch.finfo(model.dtype).eps) * one.norm():
        raise UserError(
            f"{folder} has a {type(model).__name__} that reads the tokens after the one it predicts, which is no "
            f"decoder that writes text: expected {EXPECTED}"
        )


def empty_model(source: Source) -> Any:
    """The model on the meta device, of the sizes in its configuration."""
    import transformers

    with _as_user_errors(source.folder):
        config = transformers.AutoConfig.from_pretrained(source.folder, **source.options)
        with torch.device("meta"):
            return getattr(transformers, source.auto).from_config(config).requires_grad_(False).eval()
