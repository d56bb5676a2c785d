"""Append-only logs of a run: a JSON object a line, each sealed with all before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from cnext import durable, records
from cnext.errors import parse_json
from cnext.regular_files import read_bytes
from cnext.runs import checkpoint, schemas, seals

T = TypeVar("T")


class Log(Generic[T]):
    """A log that this process alone appends to. Its checksum is of what was written, not of what is on the disk.

    Args: kind: of its rows.  run: as for `seals.Chain`.

    Attributes:
        rows: all of them.
        damage: the first line that is not as it was written, in words; "" where there is none. It and those after it
            are not among the rows, and are gone from the file with the next row.
    """

    def __init__(self, path: Path, kind: type[T], run: str | None) -> None:
        self.path, self.kind, self.run, self.damage = path, kind, run, ""
        self._lines: list[bytes] = []
        self.rows: list[T] = []
        self._chain, self._whole = seals.Chain(path.name, run), True
        content = read_bytes(path) if path.is_file() else b""
        *lines, unfinished = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = schemas.convert(parse_json(line), kind, path)
                if not self._chain.follows(line):
                    raise ValueError("its seal is another")
            except ValueError as error:
                reason = str(error).removeprefix(f"{path}: ")
                self.damage = f"{path}:{number} is not as it was written ({reason})"
                break
            self._lines.append(line)
            self.rows.append(row)
        if self.damage or unfinished:
            self._whole = False
            self._restart()

    def _restart(self) -> None:
        self._chain = seals.Chain(self.path.name, self.run)
        seals.intact(self._lines, self._chain)

    def append(self, rows: Iterable[T]) -> None:
        """Adds rows, durably."""
        rows = list(rows)
        lines = [self._chain.add(json.dumps(records.plain(row)).encode()) for row in rows]
        self._lines += lines
        self.rows += rows
        if not self._whole:
            self._rewrite()
            return
        durable.append(self.path, b"".join(line + b"\n" for line in lines))

    def keep(self, wanted: Callable[[T], bool]) -> list[T]:
        """The rows up to the first that is not wanted, which alone stay in the file; their seals are of no others."""
        kept = list(takewhile(lambda pair: wanted(pair[1]), zip(self._lines, self.rows, strict=True)))
        if len(kept) < len(self.rows) or not self._whole:
            self._lines, self.rows = [line for line, _ in kept], [row for _, row in kept]
            self._restart()
            self._rewrite()
        return list(self.rows)

    def _rewrite(self) -> None:
        checkpoint.write_bytes(self.path, self.content())
        self._whole = True

    def content(self) -> bytes:
        """What was written."""
        return b"".join(line + b"\n" for line in self._lines)

    def checksum(self) -> dict[str, Any]:
        """Length and SHA-256 of what was written, for a checkpoint's manifest."""
        content = self.content()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def check(self, kept: dict[str, Any]) -> None:
        """Raises Damaged where what is there does not begin with what a checkpoint's manifest has the checksum of."""
        content = self.content()[: kept["bytes"]]
        if {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} != kept:
            raise checkpoint.Damaged(self.damage or f"{self.path} has changed since it was written")
