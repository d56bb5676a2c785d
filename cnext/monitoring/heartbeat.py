"""The heartbeat file and the log of a run, by which `cnext status` and studies see how far it is."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from cnext import records
from cnext.records import Count, Finite, Record
from cnext.runs import seals

LOG, FILE = "run.log", ".heartbeat.json"
EVERY = 1.0
"""Least seconds between two heartbeats."""
PATIENCE = 120.0
"""Seconds without a heartbeat after which a run on another machine counts as gone, or ten steps if they take longer."""
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n?(?:[ \t]+\S.*\n?)?", re.MULTILINE)
"""A warning as Python prints it: file, line, category and text, and below them the line of code, indented."""


class Beat(Record, kw_only=True):
    """The content of the heartbeat file.

    pid, start_time, host: of the process.  time: of the heartbeat, seconds since the epoch.  why: it stopped or failed.
    doing: in words.  stage, task, step: as in train.jsonl.  steps: of the task.  share, left, whole: as in `Estimate`.
    """

    pid: Count
    start_time: Finite | None = None
    host: str
    time: Finite
    state: str
    why: str
    doing: str
    stage: int | None = None
    task: str | None = None
    step: int | None = None
    steps: int | None = None
    share: Finite | None = None
    seconds_per_step: Finite | None = None
    left: Finite | None = None
    whole: Finite | None = None


def start_time(pid: int) -> float | None:
    """Seconds from the system's boot to the start of a process; None where there is no such process, or a zombie.

    Tells a process from a later one with the same pid, also after the system's clock has been set.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return round(process.create_time() - psutil.boot_time(), 2)
    except psutil.Error:
        return None


class Heartbeat:
    """Writes a run's heartbeat file. Errors of writing are ignored, so that they do not stop the run."""

    def __init__(self, folder: Path) -> None:
        self.path, self._run = folder / FILE, None
        with suppress(seals.Changed):
            self._run = seals.run_of(folder)
        pid, host = os.getpid(), socket.gethostname()
        self.beat = Beat(
            pid=pid, start_time=start_time(pid), host=host, time=time.time(), state=RUNNING, why="", doing="loading"
        )
        self._last = 0.0
        self._write()

    def update(self, **values: Any) -> None:
        """Sets fields of `Beat`; writes the file unless that was less than `EVERY` ago."""
        self.beat = msgspec.structs.replace(self.beat, **values)
        if time.monotonic() - self._last >= EVERY:
            self._write()

    def end(self, state: str, why: str = "") -> None:
        """Writes the last heartbeat."""
        self.beat = msgspec.structs.replace(self.beat, state=state, why=why)
        self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        self.beat = msgspec.structs.replace(self.beat, time=time.time())
        unfinished = self.path.with_name(f"{FILE}.unfinished")
        with suppress(OSError):
            values = seals.sealed(msgspec.structs.asdict(self.beat), FILE, self._run)
            unfinished.write_text(json.dumps(values), encoding="utf-8")
            os.replace(unfinished, self.path)


def read(folder: Path) -> Beat | None:
    """The last heartbeat, or None if there is none. Raises UserError where the file is something else."""
    path = folder / FILE
    if not path.exists():
        return None
    anything: Any = Any
    cure = "delete it"
    return records.convert(seals.opened(records.read(path, anything, cure), path, cure=cure), Beat, path, cure)


def alive(beat: Beat, now: float) -> bool:
    """Whether the process of a heartbeat exists; on another machine, whether the heartbeat is recent."""
    if beat.state != RUNNING:
        return False
    if beat.host != socket.gethostname():
        return now - beat.time < max(PATIENCE, 10 * (beat.seconds_per_step or 0))
    found = start_time(beat.pid)
    return found is not None and found == beat.start_time


def log(folder: Path, text: str) -> None:
    """Appends a line with the time to the run's log. Errors are ignored: a full disk fails at the next checkpoint."""
    with suppress(OSError), open(folder / LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(stamped(text) + "\n")


def stamped(text: str) -> str:
    """The text with the time before it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


def last_line(folder: Path) -> str:
    """The last line of the run's log, except warnings of libraries; "" where there is none."""
    path = folder / LOG
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = _WARNING.sub("", file.read().decode("utf-8", "replace")).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
