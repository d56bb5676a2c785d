"""judge/<name>.json: a table with a checksum of its own, and of the predictions that it is about."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cnext import records
from cnext.errors import UserError
from cnext.records import RelativePath
from cnext.regular_files import read_bytes
from cnext.runs.schemas import Answer, JudgeTable, read_rows

AGAIN = "judge the run again"


def sealed(table: dict[str, Any]) -> dict[str, Any]:
    """A table with a checksum of all of it under ``sha256``."""
    content = {name: value for name, value in table.items() if name != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def answers_digest(run: Path, file: Path) -> str:
    """SHA-256 of a file of predictions and of the images that it names; one that is missing counts as such."""
    found = hashlib.sha256(read_bytes(file))
    for row in read_rows(file, Answer):
        image = run / row.image if row.image else None
        if image is not None:
            found.update(hashlib.sha256(read_bytes(image)).digest() if image.is_file() else b"missing")
    return found.hexdigest()


def read(run: Path, file: Path) -> JudgeTable:
    """The table of a judge in a run's folder.

    A table of an earlier version has no checksums, and predictions may have been deleted: neither is checked.

    Raises:
        UserError: it is no such table, or it or the predictions that it is about have changed since it was written.
    """
    values = records.read(file, dict[str, Any], f"expected what `cnext judge` writes; {AGAIN}")
    table = records.convert(values, JudgeTable, file, f"expected what `cnext judge` writes; {AGAIN}")
    if table.sha256 is not None and sealed(values) != values:
        raise UserError(f"{file} has changed since `cnext judge` wrote it; {AGAIN}")
    for name, digest in table.predictions.items():
        if not (RelativePath.fits(name) and name.startswith("predictions/")):
            raise UserError(f"{file}: expected files of predictions/, got {name!r}; {AGAIN}")
        answers = run / name
        if answers.is_file() and answers_digest(run, answers) != digest:
            raise UserError(f"{answers}, or an image that it names, has changed since {file} was written; {AGAIN}")
    return table
