"""What must agree with results.json, wherever it is read: its seal, config.json, scores.jsonl and the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnext.errors import parse_json
from cnext.runs import schemas, seals
from cnext.runs.schemas import SCORES, StageScore
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
    config, scores = path.with_name(seals.CONFIG), path.with_name(SCORES)
    if config.is_file():
        there = parse_json(config.read_bytes())
        for name in SETTING:
            if name in there and there[name] != values.get(name):
                raise Changed(f"{path} is of {name} {values.get(name)!r}, {config} of {there[name]!r}; {AGAIN}")
    if scores.is_file():
        _compare(values, path, schemas.read_log(scores, StageScore), scores)
    return values


def _compare(values: Mapping[str, Any], path: Path, rows: list[StageScore], scores: Path) -> None:
    """Raises Changed where a score of results.json is not that of scores.jsonl, which may have later ones."""
    there = {(row.stage, row.task): row for row in rows}
    tasks: list[str] = values["tasks"]
    profiles: dict[str, Any] = {values.get("profile", "strict"): values, **(values.get("profiles") or {})}
    for profile, found in profiles.items():
        for stage, cells in enumerate([found["zero_shot"], *found["score_matrix"]]):
            for task, cell in zip(tasks, cells or [], strict=False):
                row = there.get((stage, task))
                if cell is not None and (row is None or row.score(profile) != cell):
                    known = "none" if row is None else row.score(profile)
                    where = f"{task} after stage {stage} ({profile})"
                    raise Changed(f"{path} has the score {cell} of {where}, {scores} has {known}; {AGAIN}")


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
