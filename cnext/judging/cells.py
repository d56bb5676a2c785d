"""The errors of a run by stage and task, and the table of their types after judging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isclose
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cnext.errors import UserError
from cnext.judging.cases import Case, asked_by, rule
from cnext.judging.statistics import wilson
from cnext.records import FileName, Record
from cnext.runs import results_file, schemas
from cnext.runs.schemas import Answer, StageScore
from cnext.scoring import BOXES
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import IDENTITY_TOLERANCE, ScoreMatrix, metrics
from cnext.scoring.text_rules import Asked

METRICS = {"forgetting": "Forgetting", "avg_hal": "Avg.HAL", "avg_iuf": "Avg.IUF", "avg_oth": "Avg.OTH"}


class Modalities(Record):
    """What is read of results.json."""

    tasks: list[FileName]
    writes: dict[str, list[str]]


@dataclass(frozen=True)
class Cell:
    """The answers to one task after one stage.

    errors: those with a score below 100, each with the points it lacks.  file: has the answers.
    """

    stage: int
    trained: str
    task: str
    samples: int
    score: float
    errors: dict[Case, float]
    file: Path = Path()


@dataclass(frozen=True)
class JudgedRun:
    """The answers of a run. tasks: in training order."""

    tasks: list[str]
    cells: list[Cell]

    @classmethod
    def read(cls, run: Path) -> JudgedRun:
        """Reads results.json, scores.jsonl and predictions/.

        Raises:
            UserError: one of them is missing or invalid; the message names it.
        """
        file, scores = run / "results.json", run / "scores.jsonl"
        for path in (file, scores):
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: a judge needs a complete run folder, with {file.name}, {scores.name} and "
                    "predictions/; give one, or run cnext-run again"
                )
        results = schemas.convert(results_file.read(file), Modalities, file)
        tasks = [*map(str, results.tasks)]
        rows = {(row.stage, row.task): row for row in schemas.read_log(scores, StageScore)}
        if strange := [key for key in rows if not 0 <= key[0] <= len(tasks) or key[1] not in tasks]:
            raise UserError(f"{scores}: expected the stages and tasks of {file.name}, got {strange[0]}")
        cells = [_cell(run, row, rows.get((0, row.task)), results.writes) for row in rows.values()]
        return cls(tasks, cells)

    def matrix(self) -> ScoreMatrix:
        """The scores of the stages after training."""
        found = ScoreMatrix(len(self.tasks))
        for cell in self.cells:
            if cell.stage:
                found.set(cell.stage - 1, self.tasks.index(cell.task), cell.score)
        return found

    def decisive(self) -> list[Cell]:
        """The cells that the averages need: each task after its own stage, and all tasks after the last."""
        last = self.matrix().stages_done
        return [c for c in self.cells if c.stage and c.stage in (self.tasks.index(c.task) + 1, last)]


def _cell(run: Path, row: StageScore, zero_shot: StageScore | None, writes: dict[str, list[str]]) -> Cell:
    stage, trained, task = row.stage, row.trained, row.task
    path = run / "predictions" / f"{stage}_{trained}" / f"{task}.jsonl"
    sha256 = row.predictions
    if not path.is_file() and zero_shot and replace(zero_shot, stage=stage, trained=trained, predictions=None) == row:
        # The answers of a method that trains nothing are the zero-shot ones, which are written once.
        path = run / "predictions" / f"0_{zero_shot.trained}" / f"{task}.jsonl"
        sha256 = zero_shot.predictions
    schemas.check_predictions(path, sha256)
    if not path.is_file():
        raise UserError(f"{path}: a judge needs a run's predictions, found none; run cnext-run again")
    answers = schemas.read_rows(path, Answer)
    for answer in answers:
        if answer.image:
            schemas.check_image(run / answer.image, answer)
    score = fsum(answer.strict for answer in answers) / len(answers) if answers else -1.0
    if not isclose(score, row.strict, abs_tol=IDENTITY_TOLERANCE):
        raise UserError(
            f"{path}: expected answers with a mean score of {row.strict}, as in scores.jsonl, got "
            f"{len(answers)} with a mean of {score}; the files are of different runs"
        )
    asked = asked_by(row.scorer, ((answer.instruction, answer.answer) for answer in answers))
    errors = {}
    for index, answer in enumerate(answers):
        if answer.strict < 100.0:
            case = _case(run, row, answer, index, asked, "image" in writes.get(task, ()))
            errors[case] = 100.0 - answer.strict
    return Cell(stage, trained, task, len(answers), score, errors, path)


def _case(run: Path, row: StageScore, answer: Answer, index: int, asked: Asked, draws: bool) -> Case:
    source, target = (Path(path) if path else None for path in (answer.source_image, answer.target_image))
    kind = ("edit" if source else "draw") if draws else "box" if row.scorer in BOXES else "text"
    image, expected = run / answer.image if answer.image else None, "" if draws else answer.answer
    by_rule = rule(row.scorer, answer.text, bool(image), expected, answer.instruction, asked, answer.error or "other")
    texts = (kind, answer.instruction, expected, answer.text)
    return Case(row.stage, row.task, index, answer.id, *texts, image, source, target, by_rule)


def table(run: JudgedRun, cells: Sequence[Cell], labels: Mapping[Case, str | None]) -> dict[str, Any]:
    """Shares of the error types by stage and task, E_c = (1/n) Σ_{s of type c} (100 - score_s), and their averages.

    Args:
        labels: the error type of each case; None or missing where it was not judged.

    Returns:
        complete, unjudged (a count), tasks, profile, metrics (``METRICS``; None where incomplete) and cells. A cell has
        its shares and counts and, where only some errors were judged, 95% intervals of the types of the others.
    """
    rows = [_row(cell, labels) for cell in cells]
    matrices = {kind: ScoreMatrix(len(run.tasks)) for kind in ERROR_TYPES}
    for row in rows:
        if row["stage"] and not row["unjudged"]:
            for kind, matrix in matrices.items():
                matrix.set(row["stage"] - 1, run.tasks.index(row["task"]), row["shares"][kind])
    # This also checks that shares add up to 100 - score, and averages to Forgetting.
    found = metrics(run.matrix(), error_matrices=matrices)
    unjudged = sum(row["unjudged"] for row in rows)
    return {
        "complete": unjudged == 0,
        "unjudged": unjudged,
        "tasks": run.tasks,
        "profile": "strict",
        "metrics": {name: found[name] for name in METRICS},
        "cells": rows,
    }


def _row(cell: Cell, labels: Mapping[Case, str | None]) -> dict[str, Any]:
    lost: dict[str | None, list[float]] = {kind: [] for kind in (*ERROR_TYPES, None)}
    for case, points in cell.errors.items():
        lost[labels.get(case)].append(points)
    shares = {kind: fsum(parts) / cell.samples for kind, parts in lost.items()}
    row = {
        **{name: getattr(cell, name) for name in ("stage", "trained", "task", "samples", "score")},
        "errors": len(cell.errors),
        "by_rule": sum(case.decided for case in cell.errors),
        "unjudged": len(lost[None]),
        "shares": {kind: shares[kind] for kind in ERROR_TYPES},
        "unjudged_share": shares[None],
    }
    if lost[None]:
        asked = Counter(label for case in cell.errors if not case.decided and (label := labels.get(case)))
        count = asked.total()
        row["undecided_by_rule"] = {
            "errors": row["errors"] - row["by_rule"],
            "judged": count,
            "types": {
                kind: {"count": asked[kind], "interval": [100.0 * end for end in wilson(asked[kind], count)]}
                for kind in ERROR_TYPES
            },
        }
    return row


def text(table: dict[str, Any]) -> str:
    """A table as text."""
    width = max([4, *(len(f"{row['stage']} {row['trained']}") for row in table["cells"])])
    wide = max([4, *(len(row["task"]) for row in table["cells"])])
    lines = [
        "Points missing from 100 by error type: hallucination (HAL), instruction unfollowing (IUF), other (OTH)",
        f"{'stage':<{width}}  {'task':<{wide}}   score     HAL     IUF     OTH  unjudged",
    ]
    for row in table["cells"]:
        shares = "".join(f"{row['shares'][kind]:8.2f}" for kind in ERROR_TYPES)
        left = f"{row['unjudged']} of {row['errors']} ({row['unjudged_share']:.2f})" if row["unjudged"] else "0"
        stage = f"{row['stage']} {row['trained']}"
        lines.append(f"{stage:<{width}}  {row['task']:<{wide}}{row['score']:8.2f}{shares}  {left}")
    values = [(label, table["metrics"][name]) for name, label in METRICS.items()]
    lines.append("  ".join(f"{label} {'not known' if value is None else f'{value:.2f}'}" for label, value in values))
    if estimates := table.get("estimates"):
        parts = [f"{METRICS[k]} {e['estimate']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" for k, e in estimates.items()]
        lines.append(f"Estimates from the judged errors, with 95% intervals: {'  '.join(parts)}")
    if not table["complete"]:
        lines.append(f"INCOMPLETE: {table['unjudged']} errors are not judged; their share counts for no type")
    return "\n".join(lines)
