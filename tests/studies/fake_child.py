"""A fake run in its own process: fast, without torch; its seed decides how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.monitoring.eta import Estimate
from cnext.monitoring.progress import Event, ForwardedProgress
from cnext.monitoring.signals import Stop
from cnext.studies import local

ENDS_WELL, KILLED, USER_ERROR, CRASHES, GOES_ON, SAVES = range(6)
EVENT = Event("step 1 of 4", Estimate(0.25, 3.0, 4.0), line=True)


def write_results(config: RunConfig, score: float = 50.0) -> None:
    """Writes the files of a finished run that a study reads, without seals."""
    setting = {"suite": "toy", "backbone": "tiny", "split": "test", "budget": "default", "recipe": {"steps": {"a": 4}}}
    results = {
        "method": config.method, "order": config.order, "seed": config.seed, "hyperparameters": {}, "tasks": ["a"],
        "finished": True, "cost": {"optimizer_steps": 4}, "score_matrix": [[score]], "zero_shot": [score],
        "metrics": {"avg_acc": score + config.seed, "forgetting": None, "new_acc": score},
    }  # fmt: skip
    config.folder.mkdir(parents=True, exist_ok=True)
    file = config.folder / "config.json"
    there = json.loads(file.read_text()) if file.exists() else setting
    file.write_text(json.dumps({name: value for name, value in there.items() if name != "seal"}))
    (config.folder / "results.json").write_text(json.dumps(results | setting))
    (config.folder / "report.html").touch()


def run(config: RunConfig, progress: ForwardedProgress) -> None:
    """Stands in for cnext.training.runner.run."""
    if config.seed == SAVES:
        saves(config, progress)
    print(f"pid {os.getpid()}", flush=True)
    progress.send(EVENT)
    if config.seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == USER_ERROR:
        raise UserError("the data is bad")
    if config.seed == CRASHES:
        raise RuntimeError("a tensor is bad")
    while config.seed == GOES_ON:
        time.sleep(0.02)
        progress.send(EVENT)
    write_results(config)


def saves(config: RunConfig, progress: ForwardedProgress) -> None:
    """Runs until it gets a signal, and takes a while to save."""
    with Stop() as stop, stop.deferred():
        print(f"pid {os.getpid()}", flush=True)
        while not stop.requested:
            time.sleep(0.02)
            progress.send(EVENT)
        time.sleep(0.3)
        (config.folder / "saved").touch()
        stop.check("saved after step 3")


def child(config: RunConfig, connection: Connection) -> None:
    """``local._run`` with the fake ``run``. In a module of its own, as spawned processes import it by name."""
    runner = ModuleType("cnext.training.runner")
    runner.run = run
    sys.modules[runner.__name__] = runner
    real_child(config, connection)


real_child = local._run


def soon(holds: Callable[[], bool]) -> bool:
    """Waits until something holds."""
    deadline = time.monotonic() + 600
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@contextmanager
def signalled(number: int, when: Callable[[], Any]) -> Iterator[list[Any]]:
    """Sends this process a signal once ``when`` has returned in another thread. Yields a list of what it returned."""
    found: list[Any] = []

    def send() -> None:
        found.append(when())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield found
    thread.join()


def forever(out: str) -> None:
    """A study of one run that never ends."""
    local._run = child
    config = RunConfig(out=Path(out), seed=GOES_ON)
    config.folder.mkdir(parents=True)
    local.run_in_parallel([SimpleNamespace(config=config)], 1)
