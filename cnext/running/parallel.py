"""Runs side by side, a process each: one that dies takes no other with it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from cnext.errors import UserError
from cnext.running.config import Plan, RunConfig
from cnext.running.progress import ForwardedProgress, StudyProgress, shown_metrics
from cnext.running.tables import read

LOG = "run.log"
TAIL = 12
"""Lines of a failed run's log that are shown."""
GRACE = 5.0
"""Seconds that a process has to end when it is told to."""
USER, OTHER = 2, 1
"""Exit statuses: what the user has to mend, and everything else."""


@dataclass(frozen=True)
class Failure:
    """A run that did not end well. status: ``USER`` or ``OTHER``.  lines: the end of what it said."""

    config: RunConfig
    status: int
    why: str
    lines: list[str]

    def __str__(self) -> str:
        head = f"failed: {name(self.config)} ({self.why}), run folder {self.config.folder}"
        return "\n".join([head, *(f"    {line}" for line in self.lines)])


def name(config: RunConfig) -> str:
    """A run's name in its study: method/order/seed-N."""
    return str(config.folder.relative_to(config.out))


def one_after_another(plans: list[Plan]) -> list[Failure]:
    """Does runs in this process. What one of them may die of does not stop the next; a mistake of ours does."""
    from cnext.running.runner import run

    failures = []
    for planned in plans:
        try:
            run(planned.config)
        except (UserError, OSError) as error:
            failures.append(Failure(planned.config, USER, "error", [f"error: {error}"]))
        except (RuntimeError, MemoryError) as error:
            lines = traceback.format_exc().splitlines()[-TAIL:]
            failures.append(Failure(planned.config, OTHER, type(error).__name__, lines))
    return failures


def side_by_side(plans: list[Plan], jobs: int) -> list[Failure]:
    """Does runs in processes of their own, ``jobs`` at a time, each with its log in ``<run folder>/run.log``.

    The run folders are there. However this ends, no process is left behind.
    """
    waiting, failures = list(reversed(plans)), []
    running: dict[Connection, tuple[SpawnProcess, RunConfig]] = {}
    with StudyProgress(len(plans), jobs) as shown:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    config = waiting.pop().config
                    shown.start(name(config))
                    with _uninterrupted():
                        connection, process = _start(config)
                        running[connection] = process, config
                for connection in wait(list(running)):
                    process, config = running[connection]
                    event = _receive(connection)
                    if event is not None:
                        shown.update(name(config), event)
                        continue
                    process.join()
                    del running[connection]
                    if process.exitcode:
                        failures.append(_failure(config, process.exitcode))
                        shown.end(name(config), f"failed, see {config.folder / LOG}", failed=True)
                    else:
                        found = read(config.folder)
                        shown.end(name(config), shown_metrics(found.values) if found else "")
        finally:
            _stop([process for process, _ in running.values()])
    return failures


def _start(config: RunConfig) -> tuple[Connection, SpawnProcess]:
    # Spawned, not forked: torch's threads do not survive a fork, nor does CUDA.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, theirs), name=name(config))
    process.start()
    theirs.close()
    return ours, process


def _run(config: RunConfig, connection: Connection) -> None:
    """What a run's process does. The interrupt key is the study's to obey: it stops this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(config.folder / LOG, "ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    from cnext.running.runner import run

    def send(event: dict[str, Any]) -> None:
        try:
            connection.send(event)
        except BrokenPipeError as error:
            raise UserError("the process of the study is gone; the same command goes on with this run") from error

    try:
        run(config, ForwardedProgress(send))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER)


def _receive(connection: Connection) -> dict[str, Any] | None:
    """The next event; None when the process has ended, perhaps in the middle of one."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        connection.close()
        return None


def _failure(config: RunConfig, exitcode: int) -> Failure:
    why = f"exit status {exitcode}"
    if exitcode < 0:
        why = f"ended by signal {-exitcode}, {signal.strsignal(-exitcode)}"
        why += "; the system does this when memory runs out" if -exitcode == signal.SIGKILL else ""
    log = config.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    return Failure(config, USER if exitcode == USER else OTHER, why, lines)


def _stop(processes: list[SpawnProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process started inside ignores the interrupt key from its first instruction on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
