"""results.json: everything about a run that the same command gives again, bit for bit. Measured costs are elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from cnext.config.run_config import Plan
from cnext.methods.base import Method
from cnext.runs import environment
from cnext.scoring.base import ERROR_TYPES, PROFILES
from cnext.scoring.matrix import ScoreMatrix, metrics

Scores = dict[tuple[int, str], dict[str, Any]]


def _matrix(scores: Scores, order: tuple[str, ...], *keys: str) -> ScoreMatrix:
    matrix = ScoreMatrix(len(order))
    for (stage, task), row in scores.items():
        value: Any = row
        for key in keys:
            value = value[key]
        if stage:
            matrix.set(stage - 1, order.index(task), value)
    return matrix


def results(
    planned: Plan, method: Method, scores: Scores, ledger: dict[str, Any], fingerprint: dict[str, Any] | None
) -> dict[str, Any]:
    """The results of a run, from the rows of its scores.jsonl and the ledger of its last checkpoint."""
    order, tasks = planned.order, [planned.suite.task(name) for name in planned.order]
    profiles = {}
    for profile in PROFILES:
        matrix = _matrix(scores, order, profile)
        errors = {kind: _matrix(scores, order, "errors", profile, kind) for kind in ERROR_TYPES}
        zero_shot = [scores[0, name][profile] for name in order]
        profiles[profile] = {
            "score_matrix": matrix.to_rows(),
            "zero_shot": zero_shot,
            "metrics": metrics(matrix, zero_shot, errors, [task.writes for task in tasks]),
            "error_matrix": {kind: shares.to_rows() for kind, shares in errors.items()},
        }
    trained = ledger["trained"]
    config = planned.as_dict()
    return {
        **{
            key: config[key]
            for key in ("method", "hyperparameters", "backbone", "suite", "budget", "order", "seed", "split")
        },
        "finished": all((len(order), name) in scores for name in order),
        "joint": method.joint,
        "card": dataclasses.asdict(method.card),
        "tasks": list(order),
        "reads": {task.name: list(task.reads) for task in tasks},
        "writes": {task.name: list(task.writes) for task in tasks},
        "samples": {name: scores[0, name]["samples"] for name in order},
        "profile": "strict",
        **profiles["strict"],
        "profiles": {"paper": profiles["paper"]},
        "averaging": [row for row in ledger["averaging"] if row],
        "cost": {
            "adapter_parameters": sum(parameter.numel() for parameter in method.held().values()),
            "trainable_params": max((row["parameters"] for row in trained.values()), default=0),
            "trainable_params_by_task": {name: row["parameters"] for name, row in trained.items()},
            "stored_bytes": ledger["stored_bytes"],
            "optimizer_steps": sum(row["steps"] for row in trained.values()),
            "supervised_tokens": sum(row["tokens"] for row in trained.values()),
        },
        "digests": ledger["digests"],
        "fingerprint": fingerprint,
        "versions": environment.versions(),
    }
