"""The table of a judge in a run's folder: which file it is written to, and what the one before it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from msgspec import field

from cnext.errors import UserError
from cnext.judging.cells import JudgedRun
from cnext.records import Count, Record, convert, read
from cnext.runs import judge_tables

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
    predictions: dict[str, str] = field(default_factory=dict)


class Spent(Record):
    """What is read of a table or of a validation for its usage, see `client.Client`."""

    model: str
    prompts_sha256: str
    usage: dict[str, Count]


def place(file: Path, table: dict[str, Any], run: JudgedRun, digests: dict[str, str], limit: int) -> Path | None:
    """Where a table is written: to ``file``, unless it is incomplete and a complete one of the same answers is there.

    Then a sample's table gets a file beside it, and any other is not written: None.

    Args:
        digests: of all files of predictions, as `judge_tables.answers_digest`.
    """
    before = _before(file, Written)
    if table["complete"] or before is None or not (before.complete and _of_the_same_answers(before, run, digests)):
        return file
    return file.with_name(f"{file.stem}-limit-{limit}.json") if limit else None


def _before(file: Path, kind: type[T]) -> T | None:
    """What a file holds; None where there is none, or what has changed since or is no table: a new one replaces it."""
    try:
        values = read(file, dict[str, Any], "") if file.is_file() else {}
        whole = "sha256" not in values or judge_tables.sealed(values) == values
        return convert(values, kind, file, "") if whole else None
    except UserError:
        return None


def _of_the_same_answers(table: Written, run: JudgedRun, digests: dict[str, str]) -> bool:
    cells = {(cell.stage, cell.task): (cell.samples, cell.score, len(cell.errors)) for cell in run.cells}
    same = table.predictions.items() <= digests.items() and table.tasks == run.tasks
    return same and all(
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
