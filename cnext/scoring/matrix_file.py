"""Read score matrices from CSV or JSON, including results.json.

Rows are stages and columns tasks, both in training order; an empty cell (null) was not evaluated. CSV may have a header
row of task names, a first column of row labels, and a first row labelled zero-shot. JSON is a list of rows, or an
object with "score_matrix" and, each optional, "tasks", "zero_shot", "before_learnt" (each task's score right before its
stage), "writes" {task: [modalities]}, "error_matrix", "joint", "single", "chance" (a score per task) and "held_out"
{"before": [...], "after": [...]}.

Scores are in percent. A file whose scores are all at most 1 may hold fractions, and is read where the scale is given.
"""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import ScoreMatrix, metrics, reference_metrics

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
ZERO_SHOT = re.compile(r"zero[ _-]?shot", re.IGNORECASE)
SCALES = ("percent", "fraction")
OF_A_RUN = {"method", "profile", "score_matrix"}
"""Keys of results.json, whose scores are always in percent."""


@dataclass(frozen=True)
class ScoreRecord:
    """A score matrix, and other input of metrics.

    references: keyword arguments of ``reference_metrics``.  named: whether the tasks have names, else numbers.
    """

    tasks: list[str]
    matrix: ScoreMatrix
    zero_shot: list[float | None] | None = None
    errors: dict[str, ScoreMatrix] | None = None
    writes: list[list[str]] | None = None
    references: dict[str, Any] = field(default_factory=dict)
    before_learnt: list[float | None] | None = None
    named: bool = True

    def metrics(self) -> dict[str, float | None]:
        """Every metric, under its name in results.json; None where something that it needs is missing."""
        own = metrics(self.matrix, self.zero_shot, self.errors, self.writes, self.before_learnt)
        return own | reference_metrics(self.matrix, **self.references)


def read(path: Path, scale: str | None = None) -> ScoreRecord:
    """What a .csv or .json file holds, in percent. A folder: its results.json.

    Args: scale: one of ``SCALES``, that of the file; None: percent, but refused where all scores are at most 1.
    Raises:
        UserError: there is no such file, or it holds something else; says where and what.
    """
    if (path / "results.json").is_file():
        path = path / "results.json"
    if path.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"{path}: expected a score matrix in a .csv or .json file; of a run, give its results.json")
    if path.suffix.lower() == ".csv":
        return of_matrix(_from_csv(path), path, scale)
    value = read_json(path)
    given = from_json(value, str(path))
    if not of_a_run(value):
        return of_matrix(given, path, scale)
    if scale is not None:
        raise UserError(f"{path}: the scores of a run are in percent; leave out --scale")
    return _with_a_stage(given, path)


def of_a_run(value: Any) -> bool:
    """Whether a JSON value is the results.json of a run."""
    return isinstance(value, dict) and value.keys() >= OF_A_RUN


def of_matrix(given: ScoreRecord, path: Path, scale: str | None) -> ScoreRecord:
    """A record from a file of a score matrix, in percent. Raises UserError where its scale is not certain or not so."""
    given = _with_a_stage(given, path)
    rows = [*given.matrix.to_rows(), given.zero_shot or [], given.before_learnt or []]
    if scale is None and 0 < max(score for row in rows for score in row if score is not None) <= 1:
        raise UserError(
            f"{path}: all scores are at most 1: give --scale fraction where 1 is the best score, so that they are "
            "multiplied by 100, or --scale percent where they are in percent"
        )
    if scale != "fraction":
        return given

    def percent(row: list[Any], what: str) -> list[Any]:
        for column, value in enumerate(row, 1):
            if value is not None and value > 1:
                where = f"{path}, {what}, column {column}"
                raise UserError(f"{where}: expected a fraction from 0 to 1, got {value:g}; or give --scale percent")
        return [None if value is None else 100 * value for value in row]

    def matrix(of: ScoreMatrix, what: str) -> ScoreMatrix:
        return ScoreMatrix.from_rows([percent(row, f"{what}row {t}") for t, row in enumerate(of.to_rows(), 1)])

    references: dict[str, Any] = {key: percent(row, key) for key, row in given.references.items() if key != "held_out"}
    if "held_out" in given.references:
        references["held_out"] = tuple(percent(row, "held_out") for row in given.references["held_out"])
    return replace(
        given,
        matrix=matrix(given.matrix, ""),
        zero_shot=given.zero_shot and percent(given.zero_shot, "zero-shot"),
        before_learnt=given.before_learnt and percent(given.before_learnt, "before_learnt"),
        errors=given.errors and {kind: matrix(shares, f"{kind}, ") for kind, shares in given.errors.items()},
        references=references,
    )


def _with_a_stage(given: ScoreRecord, path: Path) -> ScoreRecord:
    if given.matrix.stages_done == 0:
        raise UserError(f"{path}: expected a row t with a score on every task up to task t, found none; fill one in")
    return given


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError naming line and column of what is none."""
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got something else ({error}); write the file again") from error


def from_json(value: Any, where: str, least: float = 0.0) -> ScoreRecord:
    """The record in a list of rows or an object. where: for error messages. least: the least score that there is.

    Raises:
        UserError: it is something else; says where and what.
    """
    given = value if isinstance(value, dict) else {"score_matrix": value}
    given = {key: item for key, item in given.items() if item is not None}
    rows = given.get("score_matrix")
    if not isinstance(rows, list) or not rows:
        got = _kind(rows or value)
        raise UserError(f'{where}: expected a list of rows, or an object with one as "score_matrix", got {got}')
    longest = max((len(row) for row in rows if isinstance(row, list)), default=0)
    tasks = given.get("tasks", [str(i) for i in range(1, longest + 1)])
    _check_names(tasks, f"{where}, tasks")
    size = len(tasks)
    matrix = _rows(rows, size, f"{where}, score_matrix", (least, 100))
    lists = [key for key in ("single", "chance") if key in given]
    references: dict[str, Any] = {key: _full(given[key], size, f"{where}, {key}") for key in lists}
    # In the results.json of a run "joint" is a flag: whether it learnt all tasks at once.
    if not isinstance(given.get("joint", False), bool):
        references["joint"] = _full(given["joint"], size, f"{where}, joint")
    held_out = given.get("held_out")
    # A run whose zero-shot scores are missing has scores on held-out sets, and no change of them.
    if held_out is not None and not (isinstance(held_out, dict) and "scores" in held_out and "before" not in held_out):
        before, after = (_member(held_out, key, f"{where}, held_out") for key in ("before", "after"))
        references["held_out"] = tuple(_full(row, len(before), f"{where}, held_out") for row in (before, after))
    keys = ("zero_shot", "before_learnt", "error_matrix", "writes")
    zero_shot, before, errors, writes = (given.get(key) for key in keys)
    if zero_shot is not None:
        zero_shot = _row(zero_shot, size, f"{where}, zero_shot", (least, 100))
    if before is not None:
        before = _row(before, size, f"{where}, before_learnt", (least, 100))
    if errors is not None:
        place = f"{where}, error_matrix"
        shares = {kind: _member(errors, kind, place) for kind in ERROR_TYPES}
        errors = {kind: _rows(rows, size, f"{place}, {kind}", (0, 100 - least)) for kind, rows in shares.items()}
    if writes is not None:
        writes = [_member(writes, task, f"{where}, writes") for task in tasks]
        for task, modalities in zip(tasks, writes, strict=True):
            _check_names(modalities, f"{where}, writes, {task}")
    return ScoreRecord(tasks, matrix, zero_shot, errors, writes, references, before, named="tasks" in given)


def _rows(value: Any, size: int, where: str, limits: tuple[float, float]) -> ScoreMatrix:
    if not isinstance(value, list) or not 1 <= len(value) <= size:
        raise UserError(f"{where}: expected a list of 1 to {size} rows, one a stage, got {_kind(value)}")
    return ScoreMatrix.from_rows([_row(row, size, f"{where}, row {t}", limits) for t, row in enumerate(value, 1)])


def _row(value: Any, size: int, where: str, limits: tuple[float, float]) -> list[float | None]:
    if not isinstance(value, list) or len(value) != size:
        raise UserError(f"{where}: expected a list of {size} scores, null where not evaluated, got {_kind(value)}")
    cells = enumerate(value, 1)
    return [None if cell is None else _score(cell, f"{where}, column {i}", limits) for i, cell in cells]


def _full(value: Any, size: int, where: str) -> list[float]:
    row = _row(value, size, where, (0, 100))
    if None in row:
        raise UserError(f"{where}, column {row.index(None) + 1}: expected a score, got null")
    return [cell for cell in row if cell is not None]


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}; correct the path"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, got {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise UserError(f"{path}: expected scores, got an empty file; write one row a stage")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else json.dumps(value)


def _score(value: Any, where: str, limits: tuple[float, float] = (0, 100)) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: expected a score in percent, or nothing where not evaluated, got {_kind(value)}")
    least, most = limits
    if not least <= value <= most:
        raise UserError(f"{where}: expected a score in percent, from {least:g} to {most:g}, got {value}; correct it")
    return float(value)


def _member(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        raise UserError(f'{where}: expected an object with a list for "{key}", got {json.dumps(value)[:80]}')
    return value[key]


def _check_names(names: Any, where: str) -> None:
    words = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not words or not names or len(set(names)) < len(names):
        raise UserError(f"{where}: expected a list of distinct names, got {json.dumps(names)}")


def _from_csv(path: Path) -> ScoreRecord:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: expected cells between commas, got {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells) or len(cells) > 1]
    if not lines:
        raise UserError(f"{path}: expected scores, got empty lines alone; write one row a stage")
    first, head = lines[0]
    for number, cells in lines:
        if len(cells) != len(head):
            raise UserError(
                f"{path}, line {number}: expected {len(head)} cells as in line {first}, got {len(cells)}; "
                "leave empty what was not evaluated"
            )
    named = not any(NUMBER.fullmatch(cell) for cell in head) and all(head[1:] or head)
    body = lines[named:]
    labels = [cells[0] for _, cells in body]
    skip = int((named and not head[0]) or _are_labels(labels))
    if len(head) == skip:
        raise UserError(f"{path}, line {first}: expected a column a task, with commas between, got {head[0]!r} alone")
    tasks = head[skip:] if named else [str(i) for i in range(1, len(head) - skip + 1)]
    _check_names(tasks, f"{path}, line {first}")
    rows = [
        [_cell(cell, f"{path}, line {number}, column {i}") for i, cell in enumerate(cells[skip:], skip + 1)]
        for number, cells in body
    ]
    if skip:
        _check_labels(labels, tasks, path)
    zero_shot = rows.pop(0) if skip and labels and ZERO_SHOT.fullmatch(labels[0]) else None
    if not 1 <= len(rows) <= len(tasks):
        raise UserError(
            f"{path}: expected 1 to {len(tasks)} rows of scores, as many as tasks at most, got {len(rows)}; "
            "a row before any training is the first and labelled zero-shot"
        )
    return ScoreRecord(tasks, ScoreMatrix.from_rows(rows), zero_shot, named=named)


def _cell(cell: str, where: str) -> float | None:
    return _score(float(cell) if NUMBER.fullmatch(cell) else cell, where) if cell else None


def _are_labels(cells: list[str]) -> bool:
    """Whether a first column without a header holds labels: no number among them, "zero-shot" first, or a count."""
    counts = [[str(start + t) for t in range(len(cells))] for start in (0, 1)]
    words = any(cells) and not any(NUMBER.fullmatch(cell) for cell in cells)
    return words or (len(cells) > 1 and (cells in counts or ZERO_SHOT.fullmatch(cells[0]) is not None))


def _check_labels(labels: list[str], tasks: list[str], path: Path) -> None:
    if any(ZERO_SHOT.fullmatch(label) for label in labels[1:]):
        raise UserError(f"{path}: expected the row labelled zero-shot first, got {', '.join(labels)}")
    learnt = [label for label in labels if not ZERO_SHOT.fullmatch(label)]
    if set(learnt) <= set(tasks) and learnt != tasks[: len(learnt)]:
        raise UserError(
            f"{path}: expected rows and columns in the same order, that of training, "
            f"got rows {', '.join(learnt)} and columns {', '.join(tasks)}"
        )
