"""Checkpoints that are whole or not there: safetensors files, then a manifest with their checksums, then one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from cnext.errors import UserError

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new content, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    _write_through(unfinished, text.encode())
    os.replace(unfinished, path)


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
    """Writes a checkpoint: one ``<key>.safetensors`` per entry of ``tensors``, and ``values`` in the manifest."""
    # Serialized in memory and written by Python, so that a full disk is an OSError like everywhere else.
    from safetensors.torch import save as serialize

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    checksums = {}
    for key, state in tensors.items():
        content = serialize({name: tensor.detach().contiguous() for name, tensor in state.items()})
        checksums[f"{key}.safetensors"] = hashlib.sha256(content).hexdigest()
        _write_through(unfinished / f"{key}.safetensors", content)
    write_json(unfinished / MANIFEST, {"files": checksums, **values})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


def manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises UserError where it cannot be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {folder} has no readable {MANIFEST}: {error}; delete it to go on from the one before"
        ) from error


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint back, checksums compared. Raises UserError naming the file that is not what was written."""
    from safetensors.torch import load_file

    values = manifest(folder)
    tensors = {}
    for name, checksum in values.pop("files").items():
        path = folder / name
        if not path.is_file() or _digest(path) != checksum:
            raise UserError(f"{path} is missing or damaged; delete {folder} to go on from the checkpoint before it")
        tensors[path.stem] = load_file(path)
    return tensors, values
