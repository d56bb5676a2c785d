"""Read a run folder, finished or not, for analyses and reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict, replace

from cnext.errors import UserError, printable
from cnext.records import Record
from cnext.runs import judge_tables, results_file, schemas, seals
from cnext.runs.schemas import (
    SCORES,
    SEPARABILITY,
    Answer,
    Config,
    Cost,
    Environment,
    JudgeTable,
    LeftOutRows,
    Matrix,
    Results,
    Row,
    Separability,
    StageScore,
    TrainStep,
)
from cnext.scoring.matrix import ScoreMatrix

NOTHING = "\N{EN DASH}"


def points(value: float | None, signed: bool = False) -> str:
    """A value in percentage points with one decimal and a typographic minus sign; a dash for None and NaN."""
    if value is None or not np.isfinite(value):
        return NOTHING
    rounded = round(value, 1) or 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.1f}".replace("-", "\N{MINUS SIGN}")


def mean_seen(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN where there are none."""
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if len(seen) else np.nan


@dataclass(frozen=True)
class Run:
    """The files of a run folder. Stage 0 is the model before training, stage t the model after the t-th task."""

    path: Path
    results: Results
    cost: Cost = field(default_factory=Cost)
    """cost.json, with the exact counts of results.json."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """config.json, environment.json and options.json with all of their keys; {} where a file is missing."""
    left_out: dict[str, dict[str, dict[str, LeftOutRows]]] = field(default_factory=dict)
    """Rows of the data that are left out, by task, split and reason."""

    @classmethod
    def read(cls, path: Path) -> Run:
        """Reads the folder. Raises UserError where results.json is missing, or a file is not what a run writes."""
        file = path / "results.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; give a folder in which cnext-run has evaluated a stage")
        results = schemas.convert(results_file.read(file), Results, file)
        file = path / "cost.json"
        measured = schemas.read(file, Cost) if file.is_file() else Cost()
        counted = {name: value for name, value in asdict(results.cost).items() if value not in (None, [])}
        files = {path / "config.json": Config, path / "environment.json": Environment, path / "options.json": Record}
        others = [schemas.read_object(file, kind) if file.is_file() else {} for file, kind in files.items()]
        for found in others:
            found.pop(seals.SEAL, None)
        file = path / "left_out.json"
        rows = schemas.read(file, dict[str, Any]) if file.is_file() else {}
        rows.pop(seals.SEAL, None)
        left_out = schemas.convert(rows, dict[str, dict[str, dict[str, LeftOutRows]]], file)
        return cls(path, results, replace(measured, **counted), *others, left_out=left_out)

    @property
    def tasks(self) -> list[str]:
        return [str(task) for task in self.results.tasks]

    @cached_property
    def scores(self) -> np.ndarray:
        """(T + 1, T) float64: percent, row = stage, column = task in training order, NaN where not evaluated."""
        return self.staged(self.results.score_matrix, self.results.zero_shot)

    def staged(self, matrix: Matrix | None, zero_shot: Row | None = None) -> np.ndarray:
        """A matrix of results.json with the zero-shot row first; missing rows are NaN."""
        table = np.full((len(self.tasks) + 1, len(self.tasks)), np.nan)
        for stage, row in enumerate([zero_shot, *(matrix or [])]):
            if row is not None:
                table[stage] = np.array(row, dtype=float)
        return table

    @cached_property
    def last(self) -> int:
        """The last stage that was evaluated."""
        return int(np.flatnonzero(np.isfinite(self.scores).any(1)).max(initial=0))

    @cached_property
    def matrix(self) -> ScoreMatrix:
        """The scores of stages from 1 on, of which metrics are computed."""
        gap: Row = [None] * len(self.tasks)
        rows = [row or gap for row in self.results.score_matrix]
        return ScoreMatrix.from_rows(rows + [gap] * (len(self.tasks) - len(rows)))

    @property
    def finished(self) -> bool:
        """Whether every task was evaluated after the last stage."""
        return self.results.finished

    @property
    def method(self) -> str:
        return self.results.method

    @property
    def untrained(self) -> bool:
        """Whether no optimizer step was taken: nothing can be learnt or forgotten."""
        return self.results.cost.optimizer_steps == 0

    def metric(self, name: str) -> float | None:
        """A metric of the main profile; None where it is undefined, such as forgetting without training."""
        if self.untrained and not name.startswith(("avg_acc", "worst_acc")):
            return None
        return self.results.metrics.get(name)

    @property
    def joint(self) -> bool:
        """Whether all tasks were trained at once, in the last stage."""
        return self.results.joint

    @property
    def stages(self) -> list[int]:
        """All stages, done or not; of joint training 0 and the last."""
        return [0, len(self.tasks)] if self.joint else list(range(len(self.tasks) + 1))

    def learnt(self, task: int) -> int:
        """The stage that trains a task; tasks are counted from 0."""
        return len(self.tasks) if self.joint else task + 1

    def stage(self, number: int) -> str:
        """A stage's number and name: "0 zero-shot", "2 ImageNet", "6 joint"."""
        if not number:
            return "0 zero-shot"
        return f"{number} {'joint' if self.joint else self.tasks[number - 1]}"

    def modalities(self, side: str, task: str) -> list[str]:
        """The modalities that a task reads or writes (side "reads" or "writes")."""
        return getattr(self.results, side).get(task, [])

    def predictions(self, stage: int, task: str) -> list[Answer]:
        """The answers to a task's samples after a stage; empty where it was not evaluated."""
        path = self.path / "predictions" / self.stage(stage).replace(" ", "_", 1) / f"{task}.jsonl"
        schemas.check_predictions(path, self._written.get((stage, task)))
        return schemas.read_rows(path, Answer)

    @cached_property
    def _written(self) -> dict[tuple[int, str], str]:
        """SHA-256 of the file of answers by (stage, task), where scores.jsonl has it."""
        rows = schemas.read_log(self.path / SCORES, StageScore)
        return {(row.stage, row.task): row.predictions for row in rows if row.predictions}

    @cached_property
    def separability(self) -> Separability | None:
        """How separable the tasks are without training; None where it was not measured."""
        file = self.path / SEPARABILITY
        return schemas.read(file, Separability) if file.is_file() else None

    @cached_property
    def answered(self) -> bool:
        """Whether the folder has predictions."""
        return any(self.path.glob("predictions/*/*.jsonl"))

    def answers(self, task: str) -> list[dict[int, Answer]]:
        """A task's samples, each as {stage: row} over the stages at which it was answered, in their fixed order.

        Raises UserError where two stages answered different samples.
        """
        stages = {stage: rows for stage in range(len(self.tasks) + 1) if (rows := self.predictions(stage, task))}
        asked = {stage: [row.id for row in rows] for stage, rows in stages.items()}
        for stage, ids in asked.items():
            if ids != next(iter(asked.values())):
                raise UserError(
                    f"{self.path}: expected answers to the same samples of {task} at every stage, got others at stage "
                    f"{self.stage(stage)}; they are not of one run"
                )
        return [dict(zip(stages, rows, strict=True)) for rows in zip(*stages.values(), strict=True)]

    @cached_property
    def judged(self) -> dict[str, JudgeTable]:
        """The tables that ``cnext judge`` wrote, by the name of their file."""
        files = sorted(self.path.glob("judge/*.json"))
        return {printable(file.stem): judge_tables.read(self.path, file) for file in files}

    @cached_property
    def losses(self) -> dict[int, np.ndarray]:
        """Training loss per stage, in the order of the steps; of a step that was run twice, the later run."""
        stages: dict[int, dict[int, float]] = {}
        for row in schemas.read_log(self.path / "train.jsonl", TrainStep):
            if not 1 <= row.stage <= len(self.tasks):
                raise UserError(f"{self.path / 'train.jsonl'}: expected stages 1 to {len(self.tasks)}, got {row.stage}")
            stages.setdefault(row.stage, {})[row.step] = row.loss
        done, counted = sum(map(len, stages.values())), self.results.cost.optimizer_steps or 0
        if stages and done < counted and seals.run_of(self.path) is not None:
            file = self.path / "results.json"
            raise seals.Changed(f"{self.path / 'train.jsonl'} has {done} steps, {file} counts {counted:g}; restore it")
        return {stage: np.array([steps[step] for step in sorted(steps)], float) for stage, steps in stages.items()}
