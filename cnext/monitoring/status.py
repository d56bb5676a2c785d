"""``cnext status``: the state of the runs in a folder, from their heartbeats, logs and results. Read-only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cnext.errors import RESUME, UserError
from cnext.monitoring import heartbeat
from cnext.monitoring.eta import duration, study_left, time_left
from cnext.monitoring.heartbeat import FAILED, FINISHED, RUNNING, STOPPED
from cnext.monitoring.progress import shown_metrics
from cnext.tables import aggregate

WAITING, UNKNOWN = "waiting", "unknown"
STATES = (FINISHED, RUNNING, WAITING, STOPPED, FAILED, UNKNOWN)
COPIED = (
    *("state", "why", "doing", "pid", "host", "task"),
    *("stage", "step", "steps", "share", "seconds_per_step", "left", "whole"),
)
"""Fields of a heartbeat that a status repeats."""
GONE = f"its process is gone; {RESUME}"


@dataclass
class RunStatus:
    """The state of one run; None stands for what is not known.

    Attributes:
        run: its folder.
        state: "finished", "running", "stopped" (by a signal, or its process is gone), "failed" (by an error), "waiting"
            (not started) or "unknown" (its files are damaged).
        why: it stopped, failed, or is unknown.
        log: last line of its log.
        stage, task, step, steps: where it is; steps: of the task.
        share: done, 0 to 1.
        left, whole: seconds, estimated.
        heard: seconds since its last heartbeat.
    """

    run: str
    state: str = WAITING
    why: str = ""
    log: str = ""
    stage: int | None = None
    step: int | None = None
    steps: int | None = None
    share: float | None = None
    seconds_per_step: float | None = None
    left: float | None = None
    whole: float | None = None
    task: str | None = None
    doing: str | None = None
    heard: float | None = None
    pid: int | None = None
    host: str | None = None


@dataclass
class FolderStatus:
    """The state of several runs. left: seconds until all are done, as many at a time as are running now, failed ones
    left out; None while nothing runs or nothing is known."""

    runs: list[RunStatus]
    left: float | None


def of_run(folder: Path, now: float) -> RunStatus:
    """The state of one run. now: seconds since the epoch."""
    status = RunStatus(str(folder), log=heartbeat.last_line(folder))
    try:
        beat, finished = heartbeat.read(folder), aggregate.read(folder)
    except UserError as error:
        status.state, status.why = UNKNOWN, str(error)
        return status
    if beat is not None:
        for name in COPIED:
            setattr(status, name, getattr(beat, name))
        status.heard = max(0.0, now - beat.time)
        if beat.state == RUNNING and not heartbeat.alive(beat, now):
            status.state, status.why = STOPPED, GONE
        elif beat.state == RUNNING and beat.left is not None:
            status.left = max(0.0, beat.left - status.heard)
    if finished and status.state != RUNNING:
        status.state, status.why, status.doing, status.left = FINISHED, "", shown_metrics(finished.values), 0.0
    return status


def of_folders(paths: list[Path]) -> FolderStatus:
    """The state of every run in these folders.

    Raises:
        UserError: a path is no run folder and holds none.
    """
    now = time.time()
    runs = [of_run(folder, now) for folder in aggregate.find(paths)]
    unfinished = [run for run in runs if run.state in (RUNNING, WAITING, STOPPED)]
    wholes = [run.whole for run in runs if run.whole is not None]
    running = sum(run.state == RUNNING for run in runs)
    return FolderStatus(runs, study_left([run.left for run in unfinished], wholes, running) if running else None)


def text(status: FolderStatus) -> str:
    """A line for every run, with the last line of its log below it, and one for all of them."""
    width = max(len(run.run) for run in status.runs)
    lines = []
    for run in status.runs:
        parts = [run.doing or "", run.why.partition("\n")[0]]
        if run.state == RUNNING:
            seconds = run.seconds_per_step
            parts += [f"{seconds:.3g} s a step" if seconds is not None else "", time_left(run.left)]
            parts.append(f"heartbeat {duration(run.heard or 0.0)} ago on {run.host}, process {run.pid}")
        lines.append(f"{run.run:<{width}}  {run.state:<8}  {'; '.join(part for part in parts if part)}".rstrip())
        if run.log and run.state in (RUNNING, STOPPED, FAILED):
            lines.append(f"{'':<{width}}  {run.log[:160]}")
    states = [run.state for run in status.runs]
    counts = [f"{states.count(state)} {state}" for state in STATES if state in states]
    left = f"; all runs: {time_left(status.left)}" if RUNNING in states else ""
    return "\n".join([*lines, f"{len(status.runs)} runs: {', '.join(counts)}{left}"])
