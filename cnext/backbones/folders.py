"""Checks and loads folders of weights in the layout of transformers, from disk only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cnext.errors import UserError, listed, parse_json
from cnext.regular_files import LARGEST, read_bytes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST = 10_000
"""Layers and experts of a model."""
LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of ``from_pretrained``: nothing is downloaded, and no code in the folder is executed."""


class Parts(NamedTuple):
    """Contents of a folder of weights: a transformers model, its tokenizer, and its image processor."""

    model: Any
    tokenizer: Any
    image_processor: Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where it is none."""
    try:
        value = parse_json(read_bytes(path, LARGEST))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}\ncopy it again from where the weights are") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def refuse_adapter(folder: Path) -> None:
    """Raises UserError for a PEFT adapter beside a model: ``from_pretrained`` would put it into the frozen weights."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} has adapter_config.json, an adapter that transformers applies to the model beside it; expected "
            "the model alone: move the adapter's files elsewhere, or merge it"
        )


def chat_template(folder: Path) -> str | None:
    """The chat template in a folder, wherever versions of transformers put it; None if it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    names = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
    found = [read_json(folder / name).get("chat_template") for name in names if (folder / name).is_file()]
    return next((str(template) for template in found if template), None)


def shard_files(index: Path) -> list[Path]:
    """The files of weights that an index names. Raises UserError where it, or one of them, is missing or broken."""
    try:
        names = sorted(set(parse_json(read_bytes(index, LARGEST))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{index}: expected an object with 'weight_map', names of tensors and files: {error!r}"
        ) from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index}: expected names of files beside it, found {strange[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise UserError(
            f"{index}: expected {len(names)} files beside it, {len(missing)} are missing: {listed(missing)}; copy them "
            "there"
        )
    return [index.parent / name for name in names]


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, one or several. Raises UserError where there are none, or one is missing."""
    if (folder / INDEX).is_file():
        return shard_files(folder / INDEX)
    if not (folder / SINGLE).is_file():
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        raise UserError(
            f"no weights in {folder}: expected {SINGLE}, or {INDEX} and its files"
            + (f"; found {pickled}, which is pickled and not read: save the model as safetensors" if pickled else "")
        )
    return [folder / SINGLE]


def check_config(folder: Path | None, model_type: str, released: str) -> Path:
    """The folder. Raises UserError unless it has the configuration of a model of this type.

    released: what must be in it, for error messages.
    """
    expected = f"expected a folder with {released}"
    if folder is None:
        raise UserError(f"no weights given: {expected}; name it by --weights")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {expected}; download it there, or name another by --weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"no config.json in {folder}: {expected}")
    found = read_json(folder / "config.json").get("model_type")
    if found != model_type:
        raise UserError(f"{folder}/config.json is of model_type {found!r}, not {model_type!r}: {expected}")
    refuse_adapter(folder)
    return folder


def check_folder(folder: Path | None, model_type: str, released: str) -> list[Path]:
    """The files of weights in a folder. Raises UserError unless every file that the model is loaded from exists."""
    folder = check_config(folder, model_type, released)
    files = weight_files(folder)
    for either in (("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")):
        if not any((folder / name).is_file() for name in either):
            raise UserError(f"{folder} has no {' or '.join(either)}; copy it from where the weights are")
    tokenizer = read_json(folder / "tokenizer.json")
    for part in ("model", "added_tokens"):
        if part not in tokenizer:
            raise UserError(f"{folder}/tokenizer.json has no {part}; copy it again from where the weights are")
    return files


def load_parts(
    folder: Path | None, model_class: str, model_type: str, released: str, dtype: torch.dtype, device_map: str | None
) -> Parts:
    """Loads the model, frozen, in evaluation mode and with SDPA attention, its tokenizer and its image processor.

    Nothing is downloaded or unpickled, and no code in the folder is executed.

    Raises:
        UserError: a file is missing or broken, or weights are missing or of other shapes.
    """
    check_folder(folder, model_type, released)
    assert folder is not None

    import transformers

    def empty() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        with torch.device("meta"):
            return getattr(transformers, model_class)(config)

    with _as_user_errors(folder, model_class, released):
        require_same_size(folder, empty)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
        # The pixels do not depend on whether torchvision is installed.
        image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL)
        model, loading_info = getattr(transformers, model_class).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            attn_implementation="sdpa",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **LOCAL,
        )
    check_tensors(folder, loading_info)
    return Parts(model.requires_grad_(False).eval(), tokenizer, image_processor)


def load_like(model: Any, folder: Path, released: str, device: str = "cpu") -> Any:
    """A model of the same class from another folder, in the dtype of its files. device: "meta" to read no weights.

    Raises:
        UserError: a file is missing or broken, or weights are missing, of other shapes, or none of this model's.
    """
    weight_files(folder)
    with _as_user_errors(folder, type(model).__name__, released):
        loaded, loading_info = type(model).from_pretrained(
            folder,
            dtype="auto",
            device_map=device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **LOCAL,
        )
    check_tensors(folder, loading_info)
    if strange := sorted(loading_info["unexpected_keys"]):
        raise UserError(f"{folder} has weights that no {type(model).__name__} has: {listed(strange)}")
    return loaded


@contextmanager
def _as_user_errors(folder: Path, model_class: str, released: str) -> Iterator[None]:
    """Turns what transformers raises for broken folders into UserError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {model_class}: {error}\nexpected {released}; copy the broken file again"
        ) from error


def require_same_size(folder: Path, empty: Callable[[], nn.Module]) -> None:
    """Raises UserError where config.json is of a larger model than the weights, before memory for it is taken.

    empty: makes the model on the meta device; not called where config.json has more layers or experts than any model.
    """
    wrong = [f"{name} is {count:,}" for name, count in _counts(read_json(folder / "config.json")) if count > MOST]
    if not wrong:
        parameters = sum(parameter.numel() for parameter in empty().parameters())
        size = sum(file.stat().st_size for file in weight_files(folder))
        if parameters > size:  # a number takes a byte or more
            wrong = [f"it is of a model of {parameters:,} parameters, and the weights have {size:,} bytes"]
    if wrong:
        raise UserError(
            f"{folder}/config.json does not fit the weights: {listed(wrong)}; config.json and weights must be of the "
            "same model: copy both again"
        )


def _counts(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of layers and experts in a configuration and its parts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and any(part in name for part in ("layer", "depth", "experts")):
            yield name, value


def check_tensors(folder: Path, loading_info: dict[str, Any]) -> None:
    """Raises UserError where weights were missing or had other shapes than the configuration says."""
    # Older versions of transformers give only the names.
    shapes = [
        one if isinstance(one, str) else f"{one[0]} {tuple(one[1])}, not {tuple(one[2])}"
        for one in loading_info["mismatched_keys"]
    ]
    for problem, names in (
        ("are missing", sorted(loading_info["missing_keys"])),
        ("have other shapes", sorted(shapes)),
    ):
        if names:
            raise UserError(
                f"{folder}: {len(names)} of the weights that config.json asks for {problem}: {listed(sorted(names))}; "
                "config.json and weights must be of the same model"
            )
