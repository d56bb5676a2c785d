"""Atomic, checksummed checkpoints: safetensors files and a manifest, made visible by one rename."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cnext import durable
from cnext.errors import UserError, parse_json
from cnext.records import Count, FileName, Record, convert
from cnext.regular_files import LARGEST, read_bytes
from cnext.runs import seals

MANIFEST, EXTRAS = "manifest.json", "extras"
"""EXTRAS: the tensors of an imported adapter that are in no parameter of its method, as "<kind>.<name>"."""


class Manifest(Record):
    """What every checkpoint's manifest has. files: name to SHA-256.  step: 0 between tasks."""

    files: dict[str, str]
    tasks_done: Count
    step: Count


class Damaged(UserError):
    """A checkpoint that has changed since it was written, or cannot be read."""


def write_bytes(path: Path, content: bytes) -> None:
    durable.write(path, content)


def write_text(path: Path, text: str) -> None:
    durable.write(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a checksum of all of them."""
    return {**values, "sha256": _digest(json.dumps(values, sort_keys=True, allow_nan=False).encode())}


def save(folder: Path, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> None:
    """Writes a checkpoint: one ``<key>.safetensors`` per entry of ``tensors``, and ``values`` in the manifest."""
    # Written by Python, so that a full disk is an OSError.
    from safetensors.torch import save as serialize

    checksums = {}
    with durable.new_folder(folder, replace=True) as unfinished:
        for key, state in tensors.items():
            content = serialize({name: tensor.detach().contiguous() for name, tensor in state.items()})
            checksums[f"{key}.safetensors"] = _digest(content)
            durable.put(unfinished / f"{key}.safetensors", content)
        # Through JSON, so that the checksum is of what a reader gets (keys are strings, tuples are lists).
        sealed = _sealed(json.loads(json.dumps({"files": checksums, **values})))
        durable.put(unfinished / MANIFEST, _json(sealed).encode())


def manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, checksum verified. Raises Damaged."""
    try:
        values = parse_json(read_bytes(folder / MANIFEST, LARGEST))
        sealed = {key: value for key, value in values.items() if key != "sha256"} if isinstance(values, dict) else {}
        whole = bool(sealed) and _sealed(sealed) == values
    except (OSError, ValueError) as error:
        raise Damaged(f"the {MANIFEST} of the checkpoint {folder} cannot be read: {error}") from error
    # A manifest from elsewhere must not lead out of its folder.
    try:
        found = convert(sealed, Manifest, folder / MANIFEST, "")
        named = all(map(FileName.fits, found.files))
    except UserError:
        named = False
    if not (whole and named):
        raise Damaged(f"the {MANIFEST} of the checkpoint {folder} has changed since it was written")
    run = folder.parent.parent
    if (run / seals.CONFIG).is_file() and sealed.get("run") != seals.run_of(run):
        raise Damaged(
            f"the checkpoint {folder} and {run / seals.CONFIG} are of different runs; copy the whole run again"
        )
    return sealed


def verified(file: Path) -> dict[str, Any]:
    """The manifest of the checkpoint that a file is in, the file's checksum verified as well. Raises Damaged."""
    values = manifest(file.parent)
    try:
        whole = values["files"].get(file.name) == seals.file_digest(file)
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error}") from error
    if not whole:
        raise Damaged(f"{file} has changed since it was written; copy the whole run folder again")
    return values


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads a checkpoint, checksums verified. Raises Damaged naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialize

    values = manifest(folder)
    tensors = {}
    for name, checksum in values.pop("files").items():
        path = folder / name
        try:
            content = read_bytes(path)
            if _digest(content) != checksum:
                raise Damaged(f"{path} has changed since it was written")
            tensors[path.stem] = deserialize(content)
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from error
    return tensors, values
