"""The state of a run between two optimizer steps, apart from tensors, and its form in a checkpoint's manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnext import records
from cnext.runs.schemas import Merge, StageScore
from cnext.runs.state_digests import StateDigest
from cnext.training.cost import StageCost


@dataclass
class Trained:
    """What a task has trained. parameters: numbers trained.  steps, tokens: so far; supervised tokens and features."""

    parameters: int
    steps: int = 0
    tokens: int = 0


@dataclass
class Ledger:
    """What is known of the stages so far.

    Attributes:
        trained: by the task's name.
        averaging: statistics of `Method.after_task` of each stage, or None.
        measured: cost by the stage's name, "zero-shot" included; differs from run to run.
        stored_by_stage: bytes kept between tasks after a stage, adapters included, by the stage's name.
        digests: of each stage, the pretrained model included.
        stored_bytes: as stored_by_stage, at the last checkpoint.
    """

    trained: dict[str, Trained] = field(default_factory=dict)
    averaging: list[Merge | None] = field(default_factory=list)
    measured: dict[str, StageCost] = field(default_factory=dict)
    stored_by_stage: dict[str, int] = field(default_factory=dict)
    digests: list[StateDigest] = field(default_factory=list)
    stored_bytes: int = 0


@dataclass
class RunState(Ledger):
    """The state of a run. Everything but scores and fingerprints is in each checkpoint's manifest.

    Attributes:
        tasks_done: stages trained.
        step: optimizer steps done in the stage after these; 0 between two stages.
        scores: by (stage, task); saved in scores.jsonl as they come.
        extra: the same of what `Plan.extra` names, saved in extra_scores.jsonl.
        fingerprints: environments that the run was done in; saved in environment.json.
    """

    tasks_done: int = 0
    step: int = 0
    scores: dict[tuple[int, str], StageScore] = field(default_factory=dict)
    extra: dict[tuple[int, str], StageScore] = field(default_factory=dict)
    fingerprints: list[dict[str, Any]] = field(default_factory=list)

    def add_averaging(self, name: str, statistics: Mapping[str, Any] | None) -> None:
        """Adds what `Method.after_task` returned for a stage."""
        row = {"task": name, "branches": statistics}
        advice = "Method.after_task returns mean and std by branch, or None"
        self.averaging.append(records.convert(row, Merge, f"statistics of {name}", advice) if statistics else None)

    def to_manifest(self) -> dict[str, Any]:
        """{"tasks_done", "step", "ledger": the fields of `Ledger`}."""
        ledger = {item.name: records.plain(getattr(self, item.name)) for item in dataclasses.fields(Ledger)}
        return {"tasks_done": self.tasks_done, "step": self.step, "ledger": ledger}

    @classmethod
    def from_manifest(cls, values: Mapping[str, Any], path: Path) -> RunState:
        """The state that a checkpoint was saved with. Raises UserError where ``path``'s manifest has another form."""
        ledger = records.convert(values.get("ledger", {}), Ledger, path, "delete this checkpoint")
        return cls(**vars(ledger), tasks_done=values["tasks_done"], step=values["step"])
