"""CLIP models: pretrained weights through open_clip, and the small models that score the embedded suites.

A small CLIP is a folder of three files: ``model.json`` (open_clip's model configuration without the vocabulary size),
``vocabulary.json`` (a list of words, the id of each its place: 0 pads, 1 is unknown, the last ends the text, so that
open_clip's argmax pooling finds it) and ``weights.safetensors``.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnext import packages, records
from cnext.errors import UserError, parse_json
from cnext.scoring.clip_weights import WEIGHTS_FILES, load_weights, weights_in
from cnext.scoring.small_clip import SmallClip, transform
from cnext.tensor_files import read_tensors

if TYPE_CHECKING:
    from PIL.Image import Image

TINY_CLIP, SMALL_CLIP = (Path(__file__).parent / name for name in ("tiny_clip", "small_clip"))
"""The folders of the small CLIPs that are installed with cnext: of next-tiny and of next-real."""
EMBEDDED = {"tiny": TINY_CLIP, "small": SMALL_CLIP}

MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE = "model.json", "vocabulary.json", "weights.safetensors"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BATCH = 64


class WordTokenizer:
    """Texts to ids over a closed vocabulary: lower case, punctuation removed, split on white space.

    Called as open_clip's tokenizers are. Texts beyond the context lose their last words, never the end of text.

    Args:
        vocabulary: distinct words; the first two and the last are pad, unknown and end of text, and match no word.
        context_length: ids per text.
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        if len(vocabulary) < 3 or len(set(vocabulary)) != len(vocabulary):
            raise UserError(
                "expected a vocabulary of distinct words between pad, unknown (ids 0 and 1) and end of text (the last "
                f"id), got {len(vocabulary)} words, {len(set(vocabulary))} of them distinct; correct {VOCABULARY_FILE}"
            )
        self.context_length = context_length
        self._end = len(vocabulary) - 1
        self._ids = {word: i for i, word in enumerate(vocabulary) if 1 < i < self._end}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Ids of the texts, shape (N, context_length), int64."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            words = text.lower().translate(_NO_PUNCTUATION).split()[: self.context_length - 1]
            row[: len(words) + 1] = torch.tensor([*(self._ids.get(word, 1) for word in words), self._end])
        return ids


@dataclass(frozen=True)
class Clip:
    """A CLIP model in evaluation mode with the image transform and the tokenizer that belong to it."""

    model: Any
    transform: Callable[[Image], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    device: str = "cpu"

    def encode_images(self, images: Iterable[Image]) -> torch.Tensor:
        """Unit embeddings of one or more images, shape (N, D), float64 on the CPU. Takes a batch of them at a time."""
        return self._encode(images, self._pixels, self.model.encode_image)

    def encode_texts(self, texts: Iterable[str]) -> torch.Tensor:
        """Unit embeddings of one or more texts, shape (N, D), float64 on the CPU."""
        return self._encode(texts, self.tokenizer, self.model.encode_text)

    def _pixels(self, images: Sequence[Image]) -> torch.Tensor:
        return torch.stack([self.transform(image) for image in images])

    @torch.no_grad()
    def _encode(self, items: Iterable, prepare: Callable, encode: Callable) -> torch.Tensor:
        items, parts = iter(items), []
        while batch := list(islice(items, _BATCH)):
            parts.append(encode(prepare(batch).to(self.device)).cpu().double())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def needs_open_clip(name: str) -> bool:
    """Whether the CLIP of that name, as `load_clip` takes it, is loaded by open_clip: all but small ones are."""
    return name not in EMBEDDED and not (Path(name).is_dir() and weights_in(Path(name)) is None)


@cache
def load_clip(name: str, device: str) -> Clip:
    """The CLIP model of that name, loaded once per process.

    Args:
        name: "tiny" or "small", which come with cnext; "<tag>/<model>", weights that open_clip knows and downloads
            on first use, as "openai/ViT-B-32" of the benchmark; the path of such weights or of their folder, or of
            transformers' (see ``clip_weights``); a small CLIP's folder; or the name of a repository in Hugging Face's
            cache on this machine, as "openai/clip-vit-base-patch32" or "hf-hub:laion/...".
        device: where it runs.

    Raises:
        UserError: there is no such model, or its files cannot be read or downloaded, or are not a CLIP's.
    """
    path = Path(name)
    transform: Any
    if not needs_open_clip(name):
        return _clip(_load_folder(EMBEDDED.get(name, path)), device)
    packages.require_installed(f"CLIP {name}", ["open_clip_torch"])
    import open_clip

    tag, _, model_name = name.partition("/")
    if weights := path if path.is_file() else weights_in(path):
        model, transform, tokenizer = load_weights(weights)
    elif (model_name, tag) in open_clip.list_pretrained():
        quick_gelu = open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu", False)
        # open_clip logs every attempt to download; the error below tells the outcome.
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                model_name, pretrained=tag, force_quick_gelu=quick_gelu
            )
        except RuntimeError as error:
            raise UserError(
                f"expected the weights of CLIP {name!r} in open_clip's cache, or a network to fetch them; found "
                f"neither. Load it once where there is a network, or give its weights' path with --clip ({error})"
            ) from error
        finally:
            logging.disable(before)
        tokenizer = open_clip.get_tokenizer(model_name)
    elif weights := _cached_weights(name):
        model, transform, tokenizer = load_weights(weights)
    else:
        raise UserError(
            f"unknown CLIP {name!r}, and no such file; valid: {', '.join(EMBEDDED)}, a file or folder with "
            f"{' or '.join(WEIGHTS_FILES)}, a folder with {MODEL_FILE}, {VOCABULARY_FILE} and {WEIGHTS_FILE}, "
            "<tag>/<model> as open_clip.list_pretrained() has them, as in openai/ViT-B-32, or a repository in Hugging "
            "Face's cache on this machine, into which `hf download openai/clip-vit-base-patch32` puts one"
        )
    return _clip((model, transform, tokenizer), device)


def _clip(parts: tuple[Any, Callable, Callable], device: str) -> Clip:
    model, prepare, tokenizer = parts
    return Clip(model.to(device).eval(), prepare, tokenizer, device)


def _cached_weights(name: str) -> Path | None:
    """The weights of a repository in Hugging Face's cache, or None. Downloads nothing."""
    from huggingface_hub import snapshot_download

    try:
        return weights_in(Path(snapshot_download(name.removeprefix("hf-hub:"), local_files_only=True)))
    except (OSError, ValueError):  # it is not there, or the name is none
        return None


def build_tiny_clip(
    vocabulary: Sequence[str], folder: Path = TINY_CLIP
) -> tuple[torch.nn.Module, Callable, WordTokenizer]:
    """A small CLIP with random weights, to be trained, as (model, image transform, tokenizer).

    Save its state dict with safetensors as ``weights.safetensors`` and the vocabulary as ``vocabulary.json``.

    Args:
        vocabulary: as ``WordTokenizer`` takes it.
        folder: where ``model.json`` is.
    """
    return _create(folder, vocabulary, weights=None)


def _load_folder(folder: Path) -> tuple[torch.nn.Module, Callable, WordTokenizer]:
    missing = [name for name in (MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected a CLIP model's files, {', '.join(missing)} missing; pretrain it first")
    vocabulary = records.read(folder / VOCABULARY_FILE, list[str], "pretrain it again")
    return _create(folder, vocabulary, weights=folder / WEIGHTS_FILE)


def _create(
    folder: Path, vocabulary: Sequence[str], weights: Path | None
) -> tuple[torch.nn.Module, Callable, WordTokenizer]:
    try:
        config = parse_json((folder / MODEL_FILE).read_bytes())
        model = SmallClip(config, len(vocabulary))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MODEL_FILE}: expected open_clip's configuration of a small CLIP, as {TINY_CLIP / MODEL_FILE} "
            f"has it: {error!r}"
        ) from error
    if weights:
        try:
            model.load_state_dict(read_tensors(weights))
        except RuntimeError as error:
            raise UserError(
                f"{weights}: expected the weights of the CLIP in {MODEL_FILE} beside it: {error}"
            ) from error
    tokenizer = WordTokenizer(vocabulary, config["text_cfg"]["context_length"])
    return model, transform(config["vision_cfg"]["image_size"]), tokenizer
