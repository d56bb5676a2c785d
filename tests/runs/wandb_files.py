"""Reads the files that wandb writes offline: records in blocks as LevelDB's logs have them, after seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 2**15, 7


def chunks(content: bytes) -> Iterator[bytes]:
    """The records of a file, those that span blocks joined."""
    assert content[:4] == b":W&B"
    place, found = HEAD, b""
    while place < len(content):
        if BLOCK - place % BLOCK < HEAD:  # no room for a head: zeros
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + HEAD])
        found += content[place + HEAD : place + HEAD + size]
        place += HEAD + size
        if kind in (1, 4):  # whole, or the last part
            yield found
            found = b""


def records(folder: Path) -> list[list[Record]]:
    """The records of every process that logged into a run folder, the first process first."""
    wandb.teardown()  # its own process writes the rest when it ends
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[Record.FromString(chunk) for chunk in chunks(file.read_bytes())] for file in files]


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(found: list[Record]) -> list[dict[str, Any]]:
    return [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]


def summary(found: list[Record]) -> dict[str, Any]:
    rows = [values(record.summary.update) for record in found if record.WhichOneof("record_type") == "summary"]
    return {name: value for row in rows for name, value in row.items()}
