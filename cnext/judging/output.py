"""The table of a judge in a run's folder: which file it is written to, and what the one before it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from cnext.errors import UserError
from cnext.judging.cells import JudgedRun
from cnext.records import Count, Record, read

T = TypeVar("T")


class WrittenCell(Record):
    """What is read of a table's cell."""

    stage: int
    task: str
    samples: int
    score: float
    errors: int


class Written(Record):
    """What is read of a table that was written before."""

    complete: bool
    tasks: list[str]
    cells: list[WrittenCell]


class Spent(Record):
    """What is read of a table or of a validation for its usage, see `client.Client`."""

    model: str
    prompts_sha256: str
    usage: dict[str, Count]


def place(file: Path, table: dict[str, Any], run: JudgedRun, limit: int) -> Path | None:
    """Where a table is written: to ``file``, unless it is incomplete and a complete one of the same answers is there.

    Then a sample's table gets a file beside it, and any other is not written: None.
    """
    before = _before(file, Written)
    if table["complete"] or before is None or not (before.complete and _of_the_same_answers(before, run)):
        return file
    return file.with_name(f"{file.stem}-limit-{limit}.json") if limit else None


def _before(file: Path, kind: type[T]) -> T | None:
    """What a file holds; None where there is none, or something else, which a new table replaces."""
    try:
        return read(file, kind, "") if file.is_file() else None
    except UserError:
        return None


def _of_the_same_answers(table: Written, run: JudgedRun) -> bool:
    cells = {(cell.stage, cell.task): (cell.samples, cell.score, len(cell.errors)) for cell in run.cells}
    return table.tasks == run.tasks and all(
        cells.get((cell.stage, cell.task)) == (cell.samples, cell.score, cell.errors) for cell in table.cells
    )


def usage(file: Path, judge: dict[str, Any], more: Counter[str]) -> dict[str, int]:
    """The usage of all commands that wrote to a file with this judge. more: that of the present one."""
    before = _before(file, Spent)
    same = before and (before.model, before.prompts_sha256) == (judge["model"], judge["prompts_sha256"])
    return dict(sorted((Counter(before.usage if before and same else {}) + more).items()))


def usage_text(used: Counter[str]) -> str:
    """The usage of a command as text."""
    tokens = f"{used['prompt_tokens']:,} tokens in and {used['completion_tokens']:,} out, as the server counts them"
    left = f"; {used['uncounted_replies']} replies without a count" if used["uncounted_replies"] else ""
    return f"{used['requests']} requests, {tokens}{left}"
