"""The content of results.json, which is reproducible bit for bit, and of cost.json, which is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cnext import records
from cnext.config.plan import Plan
from cnext.methods.base import Method
from cnext.runs import data_file, environment, fingerprint
from cnext.runs.schemas import StageScore
from cnext.scoring.base import ERROR_TYPES, PROFILES
from cnext.scoring.matrix import ScoreMatrix, metrics, reference_metrics
from cnext.tasks.data_digest import DataDigest, joint
from cnext.training.cost import Meter, highest, total
from cnext.training.initial import described
from cnext.training.state import RunState

SETTING = ("method", "hyperparameters", "backbone", "suite", "budget", "order", "seed", "split")
"""What results.json repeats of config.json."""


def results(planned: Plan, method: Method, state: RunState, data: DataDigest, notes: list[str]) -> dict[str, Any]:
    """The content of results.json, see `cnext.run`. notes: on what the run starts from."""
    order, tasks, scores = planned.order, [planned.suite.task(name) for name in planned.order], state.scores
    config = planned.as_dict()
    return {
        **{key: config[key] for key in SETTING},
        "finished": all((len(order), name) in scores for name in order),
        "joint": method.joint,
        **described(planned, notes),
        "card": {name: getattr(method.card, name) for name in ("paper", "keeps", "rehearsal", "task_id_at_test")},
        "tasks": list(order),
        "reads": {task.name: list(task.reads) for task in tasks},
        "writes": {task.name: list(task.writes) for task in tasks},
        "samples": {row.task: row.samples for row in scores.values()},
        "profile": "strict",
        **_profile(planned, state, "strict"),
        "profiles": {name: _profile(planned, state, name) for name in PROFILES if name != "strict"},
        "averaging": records.plain([row for row in state.averaging if row]),
        "cost": _cost(method, state),
        "digests": records.plain(state.digests),
        "fingerprint": fingerprint.joined(state.fingerprints, joint(data)),
        "data": data_file.summary(data),
        "versions": environment.versions(),
    }


def _profile(planned: Plan, state: RunState, profile: str) -> dict[str, Any]:
    """Scores and metrics under a profile."""
    order = planned.order
    matrix = _matrix(state, order, lambda row: row.score(profile))
    errors = {kind: _matrix(state, order, lambda row, kind=kind: row.errors[profile][kind]) for kind in ERROR_TYPES}
    zero_shot = [row.score(profile) if (row := state.scores.get((0, name))) else None for name in order]
    before = [row.score(profile) if (row := state.extra.get((t, name))) else None for t, name in enumerate(order)]
    before[0] = None  # which zero-shot is, and a first task needs no transfer
    held_out, writes = _held_out(planned, state, profile), [planned.suite.task(name).writes for name in order]
    kept: dict[str, float | None] = {}
    if known := held_out.get("held_out"):
        ends = (known["before"], known["after"]) if "before" in known else None
        kept["zero_shot_retention"] = reference_metrics(matrix, held_out=ends)["zero_shot_retention"]
    return {
        "score_matrix": matrix.to_rows(),
        "zero_shot": zero_shot,
        "before_learnt": before,
        **held_out,
        "metrics": metrics(matrix, zero_shot, errors, writes, before) | kept,
        "error_matrix": {kind: shares.to_rows() for kind, shares in errors.items()},
    }


def _held_out(planned: Plan, state: RunState, profile: str) -> dict[str, Any]:
    """{"held_out": a `schemas.HeldOut`}; {} where nothing of a held-out set is scored."""
    names = planned.held_out
    rows = {key: row for key, row in state.extra.items() if row.task in names}
    if not rows:
        return {}
    last = max(stage for stage, _ in rows)
    scores = [[row.score(profile) if (row := rows.get((t, name))) else None for name in names] for t in range(last + 1)]
    found = {"tasks": names, "samples": {row.task: row.samples for row in rows.values()}, "scores": scores}
    if last and None not in (*scores[0], *scores[last]):
        found |= {"before": scores[0], "after": scores[last]}
    return {"held_out": found}


def _matrix(state: RunState, order: tuple[str, ...], value: Callable[[StageScore], float]) -> ScoreMatrix:
    matrix = ScoreMatrix(len(order))
    for (stage, task), row in state.scores.items():
        if stage:
            matrix.set(stage - 1, order.index(task), value(row))
    return matrix


def _cost(method: Method, state: RunState) -> dict[str, Any]:
    """Counts that are the same in every run of a configuration."""
    trained = state.trained
    return {
        "adapter_parameters": sum(parameter.numel() for parameter in method.adapter_parameters().values()),
        "trainable_params": max((row.parameters for row in trained.values()), default=0),
        "trainable_params_by_task": {name: row.parameters for name, row in trained.items()},
        "stored_bytes": state.stored_bytes,
        "optimizer_steps": sum(row.steps for row in trained.values()),
        "supervised_tokens": sum(row.tokens for row in trained.values()),
    }


def costs(state: RunState, meter: Meter, seconds: float) -> dict[str, Any]:
    """The content of cost.json: a row per stage, and totals. Steps that an interruption lost are not counted.

    seconds: of this process.
    """
    stages = []
    for name, measured in state.measured.items():
        trained = state.trained.get(name)
        steps, tokens = (trained.steps, trained.tokens) if trained else (0, 0)
        busy = measured.train_seconds
        stages.append(
            {
                "task": name,
                **dataclasses.asdict(measured),
                "stored_bytes": state.stored_by_stage.get(name),
                "steps": steps,
                "tokens": tokens,
                "tokens_per_second": tokens / busy if busy else None,
                "seconds_per_step": busy / steps if steps else None,
            }
        )
    rows = list(state.measured.values())
    return {
        "stages": stages,
        "last_process_seconds": seconds,
        "total_seconds": sum(row.train_seconds + row.evaluate_seconds for row in rows),
        "peak_memory_bytes": max([meter.peak_memory_bytes, *(row.peak_memory_bytes for row in rows)]),
        "peak_device_memory_bytes": highest(row.peak_device_memory_bytes for row in rows),
        "energy_joules": total([row.energy_joules for row in rows]),
    }
