"""``cnext status``: how the runs in a folder stand, from what each tells of itself there. It reads and nothing else."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.monitoring import heartbeat
from cnext.monitoring.eta import duration, study_left, time_left
from cnext.monitoring.heartbeat import FAILED, FINISHED, RUNNING, STOPPED
from cnext.monitoring.progress import shown_metrics
from cnext.tables import aggregate

WAITING, UNKNOWN = "waiting", "unknown"
STATES = (FINISHED, RUNNING, WAITING, STOPPED, FAILED, UNKNOWN)
NUMBERS = ("stage", "step", "steps", "share", "seconds_per_step", "left", "whole")
GONE = "its process is gone; the same command goes on after the last block"


def of_run(folder: Path, now: float) -> dict[str, Any]:
    """How one run stands.

    Returns: "state": finished, running, stopped (told to, or killed), failed (by an error), waiting (not begun), or
        unknown (its files are damaged); "why" it is not going on; "doing", "stage", "task", "step", "steps",
        "seconds_per_step", "left" and "whole" in seconds, "heard" seconds ago, "pid", "host", "log": the last line of
        its log; None for what is not known.
    """
    found: dict[str, Any] = {"run": str(folder), "state": WAITING, "why": "", "log": heartbeat.last_line(folder)}
    found |= dict.fromkeys((*NUMBERS, "task", "doing", "heard", "pid", "host"))
    try:
        beat, finished = heartbeat.read(folder), aggregate.read(folder)
    except UserError as error:
        return found | {"state": UNKNOWN, "why": str(error)}
    if beat is not None:
        found |= {key: beat[key] for key in ("state", "why", "doing", "pid", "host")}
        found |= {key: value for key in NUMBERS if _finite(value := beat.get(key))}
        found["task"] = beat.get("task") if isinstance(beat.get("task"), str) else None
        found["heard"] = max(0.0, now - beat["time"])
        if beat["state"] == RUNNING and not heartbeat.alive(beat, now):
            found |= {"state": STOPPED, "why": GONE}
        elif beat["state"] == RUNNING and found["left"] is not None:
            found["left"] = max(0.0, found["left"] - found["heard"])
    if finished and found["state"] != RUNNING:
        found |= {"state": FINISHED, "why": "", "doing": shown_metrics(finished.values), "left": 0.0}
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def of_folders(paths: list[Path]) -> dict[str, Any]:
    """Every run in these folders, and "left": seconds until all that are not finished and did not fail are done, as
    many at a time as are running now; None while nothing runs or nothing is known.

    Raises: UserError where a path is no run folder and holds none.
    """
    now = time.time()
    runs = [of_run(folder, now) for folder in aggregate.find(paths)]
    running = [run for run in runs if run["state"] == RUNNING]
    to_come = [run for run in runs if run["state"] in (RUNNING, WAITING, STOPPED)]
    wholes = [run["whole"] for run in runs if run["whole"] is not None]
    left = study_left([run["left"] for run in to_come], wholes, len(running)) if running else None
    return {"runs": runs, "left": left}


def text(status: dict[str, Any]) -> str:
    """A line for every run with its last words below it, and one for all of them."""
    runs = status["runs"]
    width = max(len(run["run"]) for run in runs)
    lines = []
    for run in runs:
        parts = [run["doing"] or "", run["why"].partition("\n")[0]]
        if run["state"] == RUNNING:
            pace, left = run["seconds_per_step"], run["left"]
            parts += [f"{pace:.3g} s a step" if pace is not None else "", time_left(left)]
            parts.append(f"heard of {duration(run['heard'])} ago on {run['host']}, process {run['pid']}")
        lines.append(f"{run['run']:<{width}}  {run['state']:<8}  {'; '.join(part for part in parts if part)}".rstrip())
        if run["log"] and run["state"] in (RUNNING, STOPPED, FAILED):
            lines.append(f"{'':<{width}}  {run['log'][:160]}")
    counts = [f"{number} {state}" for state in STATES if (number := sum(run["state"] == state for run in runs))]
    left = f"; all runs: {time_left(status['left'])}" if any(run["state"] == RUNNING for run in runs) else ""
    return "\n".join([*lines, f"{len(runs)} runs: {', '.join(counts)}{left}"])
