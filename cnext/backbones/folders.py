"""Folders of weights as transformers lays them out: what has to be there, and loading it, from disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnext.errors import UserError, parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Parts(NamedTuple):
    """What a folder of weights holds: a transformers model, its tokenizer, and its image processor."""

    model: Any
    tokenizer: Any
    image_processor: Any


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {error}\ncopy it again from where the weights are") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check_config(folder: Path | None, model_type: str, released: str) -> Path:
    """The folder. Raises UserError unless it has the configuration of a model of this type.

    Args: released: what belongs there, in words.
    """
    expected = f"expected a folder with {released}"
    if folder is None:
        raise UserError(f"no weights given: {expected}; name it by --weights")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {expected}; download it there, or name another by --weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"no config.json in {folder}: {expected}")
    found = _json(folder / "config.json").get("model_type")
    if found != model_type:
        raise UserError(f"{folder}/config.json is of model_type {found!r}, not {model_type!r}: {expected}")
    return folder


def check_folder(folder: Path | None, model_type: str, released: str) -> list[Path]:
    """The files of weights in a folder. Raises UserError unless it has every file that the model is loaded from."""
    folder = check_config(folder, model_type, released)
    names = [SINGLE]
    if (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; copy it again from where the weights are")
        names = sorted(set(shards.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {len(names)} files of weights that {INDEX} names: "
                f"{', '.join(missing)}; copy them there"
            )
    elif not (folder / SINGLE).is_file():
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        raise UserError(
            f"no weights in {folder}: expected {SINGLE}, or {INDEX} and its files"
            + (f"; found {pickled}, which is pickled and not read: save the model as safetensors" if pickled else "")
        )
    for either in (("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")):
        if not any((folder / name).is_file() for name in either):
            raise UserError(f"{folder} has no {' or '.join(either)}; copy it from where the weights are")
    words = _json(folder / "tokenizer.json")
    for part in ("model", "added_tokens"):
        if part not in words:
            raise UserError(f"{folder}/tokenizer.json has no {part}; copy it again from where the weights are")
    return [folder / name for name in names]


def load_parts(
    folder: Path | None, model_class: str, model_type: str, released: str, dtype: torch.dtype, device_map: str | None
) -> Parts:
    """The model, frozen and in evaluation mode, with SDPA attention; its tokenizer and its image processor.

    Nothing is downloaded, unpickled, or run from the folder.

    Raises: UserError where a file is missing or broken, or the weights are not all there or have other shapes.
    """
    check_folder(folder, model_type, released)
    assert folder is not None

    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        # The pixels do not depend on whether torchvision is installed.
        image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        model, told = getattr(transformers, model_class).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            attn_implementation="sdpa",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **local,
        )
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {model_class}: {error}\nexpected {released}; copy the broken file again"
        ) from error
    _check_weights(folder, told)
    return Parts(model.requires_grad_(False).eval(), tokenizer, image_processor)


def _check_weights(folder: Path, told: dict[str, Any]) -> None:
    """Raises UserError where weights were missing or had other shapes than the configuration says."""
    # Older versions of transformers give the names alone.
    shapes = [
        one if isinstance(one, str) else f"{one[0]} {tuple(one[1])}, not {tuple(one[2])}"
        for one in told["mismatched_keys"]
    ]
    for problem, names in (("are missing", sorted(told["missing_keys"])), ("have other shapes", sorted(shapes))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"{folder}: {len(names)} of the weights that config.json asks for {problem}: {', '.join(names[:5])}"
                f"{more}; config.json and weights must be of the same model"
            )
