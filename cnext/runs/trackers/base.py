"""What every tracker is given: rows of train.jsonl and scores.jsonl, and at the end the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cnext.runs.schemas import StageScore, TrainStep
from cnext.scoring.base import PROFILES

TRAINING = ("loss", "text_loss", "image_loss", "learning_rate", "grad_norm", "tokens")
Values = dict[str, float]


class Tracker:
    """Gets every row at most once from each process, those of earlier processes again. Overrides what it logs.

    Args:
        ends: optimizer steps done by the end of each stage, 0 included.
    """

    def __init__(self, ends: Mapping[int, int]) -> None:
        self._ends = dict(ends)

    def steps(self, rows: Sequence[TrainStep]) -> None:
        """Logs rows of train.jsonl."""

    def score(self, row: StageScore) -> None:
        """Logs a row of scores.jsonl."""

    def metrics(self, values: Values) -> None:
        """Logs what `final` returns; the run is finished."""

    def close(self) -> None:
        """Nothing more comes from this process."""

    def _step(self, row: TrainStep) -> int:
        """The optimizer step of the whole run, from 1 on."""
        return max(end for stage, end in self._ends.items() if stage < row.stage) + row.step


def trained(row: TrainStep) -> Values:
    """What a row of train.jsonl says, by the names in a tracker."""
    values = {f"train/{name}": getattr(row, name) for name in TRAINING}
    return {name: value for name, value in values.items() if value is not None}


def scored(row: StageScore) -> Values:
    """A task's scores after a stage, by the names in a tracker."""
    return {f"{profile}/{row.task}": row.score(profile) for profile in PROFILES}


def final(results: Mapping[str, Any]) -> Values:
    """The metrics of results.json under both scoring profiles, by the names in a tracker."""
    profiles = {"metrics": results} | {f"metrics_{name}": own for name, own in results["profiles"].items()}
    named = {f"{name}/{metric}": v for name, own in profiles.items() for metric, v in own["metrics"].items()}
    return {name: value for name, value in named.items() if value is not None}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """A configuration by dotted names, as ``recipe.batch_size``; lists as text."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else ", ".join(map(str, value))
