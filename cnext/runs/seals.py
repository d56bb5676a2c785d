"""Seals: checksums that bind each file of a run folder to its content, its name and its run.

config.json names the run. A file that was changed, or that is of another run, is refused where it is read. Folders of
earlier versions have no seals and are read as they are. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json
from cnext.regular_files import read_bytes

SEAL, CONFIG = "seal", "config.json"
NOT_OF_THE_RUN = ("data", "weights", "clip", "device", "threads", "checkpoint_interval")
"""Entries of config.json that may be others where the same run is done again: paths, and what the machine allows."""
AGAIN = "restore it, or run the same command again, which writes it anew"
_MARK = b', "seal": "'


class Changed(UserError):
    """A file of a run folder that is not as it was written, or of another run. The message names it."""


def run_name(config: Mapping[str, Any]) -> str:
    """The name of the run of a configuration: a SHA-256, the same on every machine."""
    return _sha256({key: value for key, value in config.items() if key not in NOT_OF_THE_RUN}, CONFIG, "")


def sealed(values: Mapping[str, Any], name: str, run: str | None) -> dict[str, Any]:
    """The content of a JSON file with its seal: the run, and a SHA-256 of both and of the file's name.

    Args: name: of the file.  run: None for a folder of an earlier version, which stays without seals.

    Example:
        >>> values = sealed({"seed": 0}, "cost.json", "1f")
        >>> values["seal"]["run"], opened(values, Path("cost.json")) == values
        ('1f', True)
    """
    values = {key: value for key, value in values.items() if key != SEAL}
    return values if run is None else {**values, SEAL: {"run": run, "sha256": _sha256(values, name, run)}}


def _sha256(values: Any, name: str, run: str) -> str:
    # Through JSON, so that it is of what a reader gets: keys are strings, tuples are lists.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    return hashlib.sha256(f"{name}\n{run}\n{text}".encode()).hexdigest()


def opened(values: Any, path: Path, folder: Path | None = None, cure: str = AGAIN) -> Any:
    """The content of a JSON file of a run, once its seal is verified.

    Args: folder: the run folder; None: the file's own.  cure: what the user can do where it was changed.
    Raises: Changed where the content is not as it was written, or is of another run than config.json.
    """
    if not isinstance(values, dict):
        return values
    run = _own_run(values, path, cure)
    config = (folder or path.parent) / CONFIG
    if path == config or not config.is_file():
        return values
    there = run_of(config.parent)
    if run != there:
        if run is None or there is None:
            lacking = path if run is None else config
            raise Changed(f"{lacking} has lost its seal, which the other files of its run have; {cure}")
        raise Changed(f"{path} and {config} are of different runs; {cure}")
    return values


def _own_run(values: dict[str, Any], path: Path, cure: str) -> str | None:
    """The run that a file is sealed for; None where it has no seal. Raises Changed."""
    if SEAL not in values:
        return None
    seal = values[SEAL]
    run = seal.get("run") if isinstance(seal, dict) else None
    if not isinstance(run, str) or sealed(values, path.name, run)[SEAL] != seal:
        raise Changed(f"{path} has changed since it was written: its checksum is another; {cure}")
    return run


def run_of(folder: Path) -> str | None:
    """The run of a folder, from its config.json; None where that is missing or has no seal.

    Raises: Changed where it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    cure = "restore it, or give another --out"
    try:
        values = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise Changed(f"{path}: expected JSON, could not read it ({error}); {cure}") from error
    return _own_run(values, path, cure) if isinstance(values, dict) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


class Chain:
    """The seals of the rows of an append-only log, each over its row and all rows before it.

    Args: name: of the log's file.  run: None for a log without seals.
    """

    def __init__(self, name: str, run: str | None) -> None:
        self.run = run
        self._last = hashlib.sha256(f"{name}\n{run}".encode()).hexdigest()

    def add(self, row: bytes) -> bytes:
        """The line, without its end, of a row that is a JSON object."""
        if self.run is None:
            return row
        self._last = hashlib.sha256(self._last.encode() + row).hexdigest()
        return row[:-1] + _MARK + self._last[:16].encode() + b'"}'

    def follows(self, line: bytes) -> bool:
        """Whether a line is as `add` made it, after the lines before it."""
        if self.run is None:
            return not has_seal(line)
        head, mark, _ = line.rpartition(_MARK)
        return bool(mark) and self.add(head + b"}") == line


def has_seal(line: bytes) -> bool:
    """Whether a line of a log ends with a seal."""
    return _MARK in line


def intact(lines: Iterable[bytes], chain: Chain) -> list[bytes]:
    """The lines up to the first that does not follow."""
    found = []
    for line in lines:
        if not chain.follows(line):
            break
        found.append(line)
    return found
