"""One run as a process of its own: what a launcher starts, wherever that is."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import signal
from pathlib import Path

from cnext.running import parallel
from cnext.running.config import RunConfig

FILE = ".job.json"


def write(config: RunConfig) -> Path:
    """Writes what a job is to run into the run's folder."""
    from cnext.running.checkpoint import write_text

    path = config.folder / FILE
    write_text(path, json.dumps(dataclasses.asdict(config), default=str))
    return path


def read(path: str | Path) -> RunConfig:
    """The run that ``write`` wrote."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    for field in dataclasses.fields(RunConfig):
        value, kind = values[field.name], str(field.type)
        if value is not None and kind.startswith(("Path", "tuple")):
            values[field.name] = Path(value) if kind.startswith("Path") else tuple(value)
    return RunConfig(**values)


def main(path: str) -> int:
    """Does the run, and says on standard output how it goes on. Returns the exit status."""
    # The interrupt key is the study's to obey: it tells this process to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    return parallel.perform(read(path), lambda event: None)
