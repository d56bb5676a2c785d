"""Verdicts kept in an append-only file, a JSON object a line, each under the hash of prompts, model and input."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from threading import Lock
from typing import IO, Any

from cnext.errors import UserError
from cnext.judging.requests import Prompts, key
from cnext.judging.verdict import QUESTIONS, error_type


def read_rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a last line that an interruption cut short.

    Raises:
        UserError: a line is no object or lacks a key; names file and line.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected a JSON object, got something else ({error})") from error
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}:{number}: expected a JSON object with {', '.join(needed)}; lacks {missing}")
        found.append(row)
    return found


class Verdicts:
    """The verdicts of one model under one version of the prompts.

    Args:
        path: the file; it need not be there yet unless ``model`` is None.
        model: the judge's name, or None for that of the file, which is then only read.

    Raises:
        UserError: the file holds verdicts of other prompts or of another model, or something else altogether.
    """

    def __init__(self, path: Path, prompts: Prompts, model: str | None) -> None:
        self.path, self.prompts = path, prompts
        # What helps where a file is another judge's; one to replay is given by its name.
        self._cure = "give another --name, or move the file" if model else "judge again, or replay another file"
        self._file: IO[bytes] | None = None
        self._lock = Lock()
        if model is None and not path.is_file():
            raise UserError(f"{path}: expected a file of verdicts to replay, found none")
        needed = ("key", "model", "prompts", "prompts_sha256", *QUESTIONS)
        rows = read_rows(path, needed) if path.is_file() else []
        if model is None and not rows:
            raise UserError(f"{path}: expected verdicts to replay, the file has none")
        self.model = rows[0]["model"] if model is None else model
        for row in rows:
            self._check(row)
        self._rows = {row["key"]: row for row in rows}

    def _check(self, row: dict[str, Any]) -> None:
        ours, theirs = (self.prompts.version, self.prompts.sha256), (row["prompts"], row["prompts_sha256"])
        if ours != theirs:
            raise UserError(
                f"{self.path} holds verdicts of prompts {theirs[0]} ({theirs[1][:12]}), asked for are prompts "
                f"{ours[0]} ({ours[1][:12]}), and one table may not mix them; {self._cure}"
            )
        if row["model"] != self.model:
            raise UserError(
                f"{self.path} holds verdicts of {row['model']}, asked for are those of {self.model}, and one table may "
                f"not mix them; {self._cure}"
            )
        if any(type(row[question]) is not bool for question in QUESTIONS):
            raise UserError(f"{self.path}: expected true or false for {' and '.join(QUESTIONS)}, got {row}")

    def key(self, case_sha256: str) -> str:
        return key(self.prompts.sha256, self.model, case_sha256)

    def error_type(self, name: str) -> str | None:
        """The error type of the verdict under this key; None where there is no verdict."""
        row = self._rows.get(name)
        return error_type(*(row[question] for question in QUESTIONS)) if row else None

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a verdict: on the disk when this returns. Any thread may call it."""
        head = {"model": self.model, "prompts": self.prompts.version, "prompts_sha256": self.prompts.sha256}
        with self._lock:
            file = self._opened()
            file.write(json.dumps({**row, **head}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._rows[row["key"]] = row

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "ab")  # noqa: SIM115 (closed by close)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise UserError(
                    f"another process is writing {self.path}; wait for it or give another --name"
                ) from error
            content = self.path.read_bytes()
            file.truncate(content.rfind(b"\n") + 1)
            self._file = file
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
