"""An append-only JSONL file of verdicts, each under the hash of prompts, model and input."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import IO, Any

from msgspec import field
from msgspec.structs import asdict

from cnext.errors import UserError
from cnext.judging.requests import Prompts, error_type, verdict_key
from cnext.records import Record
from cnext.runs.schemas import read_rows


class Verdict(Record):
    """A line of the file: a model's answers to the two questions about one input.

    key: as `verdict_key`.  input_sha256: as `requests.input_hash`.  stage, task, index, id: the case that was asked
    about first.  served: the model as the server names it.  tokens: of request and reply, as the
    server counts them; may be empty.  parameters: see `parameters.changes`.
    """

    key: str
    input_sha256: str
    stage: int
    task: str
    index: int
    id: str
    follows_instruction: bool
    consistent: bool
    served: str
    tokens: dict[str, int]
    model: str
    prompts: str
    prompts_sha256: str
    parameters: dict[str, Any] = field(default_factory=dict)


class Verdicts:
    """The verdicts of one model under one version of the prompts.

    Args:
        path: the file; it may be missing unless ``model`` is None.
        model: the judge's name; None: that of the file, which is then only read.

    Raises:
        UserError: the file holds verdicts of other prompts or of another model, or is no file of verdicts.
    """

    def __init__(self, path: Path, prompts: Prompts, model: str | None) -> None:
        self.path, self.prompts = path, prompts
        # The advice for a file of another judge; a file to replay is given by its name.
        self._advice = "give another --name, or move the file" if model else "judge again, or replay another file"
        self._file: IO[bytes] | None = None
        self._lock = Lock()
        if model is None and not path.is_file():
            raise UserError(f"{path}: expected a file of verdicts to replay, found none")
        rows = read_rows(path, Verdict, self._advice)
        if model is None and not rows:
            raise UserError(f"{path}: expected verdicts to replay, the file has none")
        self.model = rows[0].model if model is None else model
        for row in rows:
            self._check(row)
        self._rows = {row.key: row for row in rows}

    def _check(self, row: Verdict) -> None:
        ours = f"prompts {self.prompts.version} ({self.prompts.sha256[:12]})", self.model
        theirs = f"prompts {row.prompts} ({row.prompts_sha256[:12]})", row.model
        same = (row.prompts, row.prompts_sha256) == (self.prompts.version, self.prompts.sha256), row.model == self.model
        for mine, other, equal in zip(ours, theirs, same, strict=True):
            if not equal:
                raise UserError(
                    f"{self.path} holds verdicts of {other}, expected those of {mine}: one table may not mix them; "
                    f"{self._advice}"
                )

    def key(self, case_sha256: str) -> str:
        """The key of this judge's verdict on an input."""
        return verdict_key(self.prompts.sha256, self.model, case_sha256)

    def error_type(self, key: str) -> str | None:
        """The error type of the verdict under this key; None where there is no verdict."""
        row = self._rows.get(key)
        return error_type(row.follows_instruction, row.consistent) if row else None

    def parameters(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """What requests sent in place of the parameters of the prompts, once for verdicts that are equal in it."""
        sent = {
            json.dumps(row.parameters, sort_keys=True): row.parameters for key in keys if (row := self._rows.get(key))
        }
        return [sent[text] for text in sorted(sent)]

    def add(self, row: Verdict) -> None:
        """Appends a verdict, on the disk when this returns. Thread-safe. Raises UserError if another process writes."""
        with self._lock:
            file = self._opened()
            file.write(json.dumps(asdict(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._rows[row.key] = row

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
        """Closes the file, which releases its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
