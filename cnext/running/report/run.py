"""Reads a run folder, finished or not, into what the report needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cnext.errors import UserError

REQUIRED = ("method", "suite", "tasks", "score_matrix")

NOTHING = "\N{EN DASH}"


def points(value: float | None, signed: bool = False) -> str:
    """A figure in percentage points with one decimal and a true minus sign; a dash where there is none."""
    if value is None or not np.isfinite(value):
        return NOTHING
    rounded = round(value, 1) or 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.1f}".replace("-", "\N{MINUS SIGN}")


def mean_seen(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN where there are none."""
    seen = values[np.isfinite(values)]
    return float(seen.mean()) if len(seen) else np.nan


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError naming the file where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: expected a JSON object, could not read one ({error}); run cnext-run again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; run cnext-run again")
    return value


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, none where it is missing; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    *lines, _cut_off = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: expected one JSON object a line ({error}); run cnext-run again") from error


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Stage 0 is the model before any training, stage t the model after the t-th task."""

    path: Path
    results: dict
    config: dict
    cost: dict
    environment: dict

    @classmethod
    def read(cls, path: Path) -> Run:
        """Reads the folder. Raises UserError where results.json is missing, unreadable or lacks a key."""
        results_path = path / "results.json"
        if not results_path.is_file():
            raise UserError(f"{results_path}: no such file; give a folder in which cnext-run has evaluated a stage")
        results = read_json(results_path)
        if missing := [key for key in REQUIRED if key not in results]:
            raise UserError(f"{results_path}: expected the results of a run, lacks {missing}; run cnext-run again")
        others = [path / f"{name}.json" for name in ("config", "cost", "environment")]
        return cls(path, results, *(read_json(other) if other.is_file() else {} for other in others))

    @property
    def tasks(self) -> list[str]:
        return self.results["tasks"]

    @cached_property
    def scores(self) -> np.ndarray:
        """(T + 1, T) float64: percent, row = stage, column = task in training order, NaN where not evaluated."""
        return self.staged(self.results["score_matrix"], self.results.get("zero_shot"))

    def staged(self, matrix: list | None, zero_shot: list | None = None) -> np.ndarray:
        """A matrix of results.json with its zero-shot row put first, missing rows filled with NaN."""
        table = np.full((len(self.tasks) + 1, len(self.tasks)), np.nan)
        for stage, row in enumerate([zero_shot, *(matrix or [])]):
            if row is not None:
                table[stage] = np.array(row, dtype=float)
        return table

    @cached_property
    def last(self) -> int:
        """The last stage that was evaluated."""
        return int(np.flatnonzero(np.isfinite(self.scores).any(1)).max(initial=0))

    @property
    def finished(self) -> bool:
        """Whether every task was evaluated after its own stage and every later one."""
        learnt = self.scores[-1:] if self.joint else self.scores[1:][np.tril_indices(len(self.tasks))]
        return bool(np.isfinite(learnt).all())

    @property
    def joint(self) -> bool:
        """Whether all tasks were learnt at once, in the last stage."""
        return bool(self.results.get("joint"))

    @property
    def stages(self) -> list[int]:
        """The stages that the run has, done or not; of joint training zero-shot and the one that learns all."""
        return [0, len(self.tasks)] if self.joint else list(range(len(self.tasks) + 1))

    def learnt(self, task: int) -> int:
        """The stage that learns a task, which is counted from 0."""
        return len(self.tasks) if self.joint else task + 1

    def stage(self, number: int) -> str:
        """A stage's number and name, as everywhere in the report."""
        if not number:
            return "0 zero-shot"
        return f"{number} {'joint' if self.joint else self.tasks[number - 1]}"

    def modalities(self, side: str, task: str) -> list[str]:
        """What a task reads or writes (side "reads" or "writes")."""
        return self.results.get(side, {}).get(task, [])

    def predictions(self, stage: int, task: str) -> list[dict]:
        """What was answered to a task's samples after a stage; empty where it was not evaluated."""
        return read_rows(self.path / "predictions" / self.stage(stage).replace(" ", "_", 1) / f"{task}.jsonl")

    @cached_property
    def losses(self) -> dict[int, np.ndarray]:
        """Training loss per stage, in the order of the steps; of a step that was run twice, the later run."""
        stages: dict[int, dict[int, float]] = {}
        for row in read_rows(self.path / "train.jsonl"):
            stages.setdefault(row["stage"], {})[row["step"]] = row["loss"]
        return {stage: np.array([steps[step] for step in sorted(steps)], float) for stage, steps in stages.items()}
