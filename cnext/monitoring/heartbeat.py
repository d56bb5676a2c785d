"""What a run tells of itself in its folder while it goes on: a heartbeat, and a log that outlives the terminal."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json

LOG, FILE = "run.log", ".heartbeat.json"
EVERY = 1.0
"""Seconds between two heartbeats, at least."""
PATIENCE = 120.0
"""Seconds without a heartbeat after which a run on another machine counts as gone; ten of its steps where those take
longer."""
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
_WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n?(?:[ \t]+\S.*\n?)?", re.MULTILINE)
"""As Python prints one: file, line, kind and text; below it the line of code, indented."""
KEYS = {"pid": int, "host": str, "time": int | float, "state": str, "why": str, "doing": str}


def born(pid: int) -> str | None:
    """When a process began, in the system's own count, which tells it from a later one of the same number; "" where
    the system does not say; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


class Heartbeat:
    """Writes a run's heartbeat. One that cannot be written is no reason for the run to stop."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.values: dict[str, Any] = {
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "host": socket.gethostname(),
            "state": RUNNING,
            "why": "",
            "doing": "loading",
        }
        self._last = 0.0
        self._write()

    def beat(self, **values: Any) -> None:
        """Says how far the run is, unless it has said so a moment ago."""
        self.values |= values
        if time.monotonic() - self._last >= EVERY:
            self._write()

    def end(self, state: str, why: str = "") -> None:
        """The last that is heard of the run."""
        self.values |= {"state": state, "why": why}
        self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        unfinished = self.path.with_name(f"{FILE}.unfinished")
        with suppress(OSError):
            unfinished.write_text(json.dumps(self.values | {"time": time.time()}), encoding="utf-8")
            os.replace(unfinished, self.path)


def read(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat; None where there never was one. Raises UserError where the file is something else."""
    path = folder / FILE
    try:
        values = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a run's heartbeat, cannot read it: {error}") from error
    typed = isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in KEYS.items())
    if not typed or not math.isfinite(values["time"]):
        raise UserError(f"{path}: expected a run's heartbeat, found something else; delete it")
    return values


def alive(values: dict[str, Any], now: float) -> bool:
    """Whether the process of a heartbeat is there; of one on another machine, whether it was heard of lately."""
    if values["state"] != RUNNING:
        return False
    if values["host"] != socket.gethostname():
        step = values.get("seconds_per_step")
        return now - values["time"] < max(PATIENCE, 10 * step if isinstance(step, int | float) else 0)
    found = born(values["pid"])
    return found is not None and found == values.get("born")


def log(folder: Path, text: str) -> None:
    """Adds a line with the time to the run's log. A full disk is found out by what matters more than a log."""
    with suppress(OSError), open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(stamped(text) + "\n")


def stamped(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


def last_line(folder: Path) -> str:
    """The last line of the run's log, "" where there is none. Warnings of libraries do not count: they hide the run's
    own words."""
    path = folder / LOG
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = _WARNING.sub("", file.read().decode("utf-8", "replace")).split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
