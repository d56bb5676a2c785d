"""An append-only JSONL file of verdicts, each under the hash of prompts, model and input."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from msgspec import field
from msgspec.structs import asdict, replace

from cnext import durable
from cnext.errors import UserError, printable
from cnext.judging.requests import Prompts, error_type, verdict_key
from cnext.records import Record
from cnext.runs.schemas import read_rows


class Verdict(Record):
    """A line of the file: a model's answers to the two questions about one input.

    key: as `verdict_key`.  input_sha256: as `requests.input_hash`.  stage, task, index, id: the case that was asked
    about first.  served: the model as the server names it.  tokens: of request and reply, as the
    server counts them; may be empty.  parameters: see `parameters.changes`.  sha256: of all
    the others; "" in lines of earlier versions.
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
    sha256: str = ""

    def sealed(self) -> Verdict:
        """The same with its checksum."""
        content = json.dumps({**asdict(self), "sha256": ""}, sort_keys=True)
        return replace(self, sha256=hashlib.sha256(content.encode()).hexdigest())


class Verdicts:
    """The verdicts of one model under one version of the prompts.

    Args:
        path: the file; it may be missing unless ``model`` is None.
        model: the judge's name; None: that of the file, which is then only read.

    Raises:
        UserError: the file holds verdicts of other prompts or of another model, or such that have changed since they
            were written, or is no file of verdicts.
    """

    def __init__(self, path: Path, prompts: Prompts, model: str | None) -> None:
        self.path, self.prompts = path, prompts
        # The advice for a file of another judge; a file to replay is given by its name.
        self._asks = model is not None
        self._advice = "give another --name, or move the file" if model else "judge again, or replay another file"
        self._file: IO[bytes] | None = None
        if model is None and not path.is_file():
            raise UserError(f"{path}: expected a file of verdicts to replay, found none")
        rows = self._read()
        if model is None and not rows:
            raise UserError(f"{path}: expected verdicts to replay, the file has none")
        self.model = rows[0].model if model is None else model
        self._take(rows)

    def _read(self) -> list[Verdict]:
        rows = read_rows(self.path, Verdict, self._advice)
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._breaks_off = bool(content) and not content.endswith(b"\n")
        return rows

    def _take(self, rows: list[Verdict]) -> None:
        for number, row in enumerate(rows, 1):
            if row.sha256 and row != row.sealed():
                raise UserError(
                    f"{self.path}:{number} has changed since it was written; "
                    + ("delete the line, and what it judges is asked again" if self._asks else self._advice)
                )
            self._check(row)
        self._rows = {row.key: row for row in rows}

    def notes(self) -> list[str]:
        """What whoever uses the file should know of it."""
        found, unsealed = [], sum(not row.sha256 for row in self._rows.values())
        if unsealed:
            found.append(
                f"{self.path}: {unsealed} of {len(self._rows)} verdicts have no checksum, as earlier versions wrote "
                "them; they count as they are"
            )
        if self._breaks_off:
            then = ", and what it judges is asked again" if self._asks else ""
            found.append(f"{self.path}: the last line breaks off; it does not count{then}")
        return found

    def _check(self, row: Verdict) -> None:
        ours = f"prompts {self.prompts.version} ({self.prompts.sha256[:12]})", self.model
        theirs = f"prompts {row.prompts} ({row.prompts_sha256[:12]})", row.model
        same = (row.prompts, row.prompts_sha256) == (self.prompts.version, self.prompts.sha256), row.model == self.model
        for mine, other, equal in zip(ours, theirs, same, strict=True):
            if not equal:
                raise UserError(
                    f"{self.path} holds verdicts of {printable(other)}, expected those of {printable(mine)}: one table "
                    "may not mix them; "
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

    def open(self) -> None:
        """Keeps the file for this process, and reads what others have written meanwhile.

        Raises: UserError if another process writes it.
        """
        if self._file is not None:
            return
        durable.make_folder(self.path.parent)
        with ExitStack() as undo:
            file = undo.enter_context(self.path.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                said = f"another process is writing {self.path}; wait for it or give another --name"
                raise UserError(said) from error
            durable.sync(self.path.parent)
            content = self.path.read_bytes()
            file.truncate(content.rfind(b"\n") + 1)
            self._take(self._read())
            undo.pop_all()  # closed by close
            self._file = file

    def add(self, row: Verdict) -> None:
        """Appends a verdict, on the disk when this returns. Raises UserError as ``open``, and if the file is gone."""
        self.open()
        assert self._file is not None
        self._file.write(json.dumps(asdict(row.sealed())).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if not (self.path.is_file() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())):
            raise UserError(f"{self.path} was moved or deleted while it was written; run the command again")
        self._rows[row.key] = row.sealed()

    def close(self) -> None:
        """Closes the file, which releases its lock."""
        if self._file is not None:
            self._file.close()
            self._file = None
