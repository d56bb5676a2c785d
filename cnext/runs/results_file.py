"""What must agree with results.json, wherever it is read: its seal, config.json, scores.jsonl and the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnext.errors import parse_json
from cnext.runs import schemas, seals
from cnext.runs.schemas import EXTRA, SCORES, StageScore
from cnext.runs.seals import AGAIN, Changed

SETTING = ("method", "suite", "order", "seed", "split", "tasks")
"""What results.json repeats of config.json, under the same names in every version that seals them."""


def verified(values: Any, path: Path) -> Any:
    """The content of a results.json, once it is known to be as it was written, and of the run beside it.

    That of an earlier version, without a seal, is returned as it is.

    Raises: Changed where it or a file beside it was changed, or is of another run.
    """
    seals.opened(values, path)
    if not isinstance(values, dict) or seals.SEAL not in values:
        return values
    config = path.with_name(seals.CONFIG)
    if config.is_file():
        there = parse_json(config.read_bytes())
        for name in SETTING:
            if name in there and there[name] != values.get(name):
                raise Changed(f"{path} is of {name} {values.get(name)!r}, {config} of {there[name]!r}; {AGAIN}")
    profiles: dict[str, Any] = {values.get("profile", "strict"): values, **(values.get("profiles") or {})}
    for name, cells in ((SCORES, _in_the_matrix), (EXTRA, _in_no_matrix)):
        if (log := path.with_name(name)).is_file():
            there = {(row.stage, row.task): row for row in schemas.read_log(log, StageScore)}
            for profile, found in profiles.items():
                for stage, task, score in cells(values["tasks"], found):
                    row = there.get((stage, task))
                    if score is not None and (row is None or row.score(profile) != score):
                        known = "none" if row is None else row.score(profile)
                        where = f"{task} after stage {stage} ({profile})"
                        raise Changed(f"{path} has the score {score} of {where}, {log} has {known}; {AGAIN}")
    return values


def _in_the_matrix(tasks: list[str], found: Mapping[str, Any]) -> Iterator[tuple[int, str, float | None]]:
    """(stage, task, score) of a profile's score matrix and zero-shot row."""
    for stage, row in enumerate([found["zero_shot"], *found["score_matrix"]]):
        yield from ((stage, task, score) for task, score in zip(tasks, row or [], strict=False))


def _in_no_matrix(tasks: list[str], found: Mapping[str, Any]) -> Iterator[tuple[int, str, float | None]]:
    """(stage, task, score) of tasks before they are learnt, and of held-out sets."""
    yield from ((stage, tasks[stage], score) for stage, score in enumerate(found.get("before_learnt") or []))
    held_out = found.get("held_out") or {}
    for stage, row in enumerate(held_out.get("scores", [])):
        yield from ((stage, name, score) for name, score in zip(held_out["tasks"], row or [], strict=False))


def read(path: Path) -> dict[str, Any] | None:
    """The verified content of a results.json; None where there is none. Raises UserError as `verified`."""
    return verified(schemas.read(path, dict[str, Any]), path) if path.is_file() else None


def check_stage(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises Changed where a checkpoint between tasks has another state than results.json says of its stage.

    Args: folder: of the checkpoint.  manifest: its content.
    """
    path = folder.parents[1] / "results.json"
    if manifest.get("step") or (results := read(path)) is None:
        return
    ledger = manifest.get("ledger")
    known = {row.get("stage"): row.get("sha256") for row in (ledger or {}).get("digests", ())}
    for row in results.get("digests", ()):
        stage = row.get("stage")
        if stage in known and stage <= manifest["tasks_done"] and known[stage] != row.get("sha256"):
            there, here = str(known[stage])[:12], str(row.get("sha256"))[:12]
            raise Changed(
                f"the checkpoint {folder} is not of the run in {path}: after stage {stage} its state has SHA-256 "
                f"{there}..., results.json has {here}...; copy the whole run folder again"
            )
