"""Runs side by side, a process each: one that dies takes no other with it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from cnext.config.run_config import Plan, RunConfig
from cnext.errors import UserError
from cnext.monitoring.eta import StudyPace
from cnext.monitoring.heartbeat import LOG, stamped
from cnext.monitoring.progress import ForwardedProgress, Progress, StudyProgress, shown_metrics
from cnext.monitoring.signals import Stop, Stopped
from cnext.tables.aggregate import read

TAIL = 12
"""Lines of a failed run's log that are shown."""
GRACE = 5.0
"""Seconds that a process has to end when it is told to and not waited for."""
POLL = 0.2
"""Seconds between two looks at whether the study has been told to stop."""
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
    from cnext.training.runner import run

    failures, pace = [], StudyPace(len(plans), 1)
    for planned in plans:
        label, before = name(planned.config), len(failures)
        pace.start(label)
        try:
            run(planned.config, Progress(label, pace))
        except (UserError, OSError) as error:
            failures.append(Failure(planned.config, USER, "error", [f"error: {error}"]))
        except (RuntimeError, MemoryError) as error:
            lines = traceback.format_exc().splitlines()[-TAIL:]
            failures.append(Failure(planned.config, OTHER, type(error).__name__, lines))
        pace.end(label, failed=len(failures) > before)
        print(f"{label}: {'failed' if len(failures) > before else 'done'}  ({pace})", file=sys.stderr)
    return failures


def side_by_side(plans: list[Plan], jobs: int) -> list[Failure]:
    """Does runs in processes of their own, ``jobs`` at a time, each with its log in ``<run folder>/run.log``.

    The run folders are there. However this ends, no process is left behind. Told to stop, every run saves where it is
    before this raises Stopped; the interrupt key pressed again does not wait for that.
    """
    waiting, failures, told = list(reversed(plans)), [], False
    running: dict[Connection, tuple[SpawnProcess, RunConfig]] = {}
    with Stop() as stop, stop.held(), StudyProgress(len(plans), jobs) as shown:
        try:
            while waiting or running:
                if stop.requested and not told:
                    told, waiting = True, []
                    for process, _ in running.values():
                        process.terminate()
                while waiting and len(running) < jobs:
                    config = waiting.pop().config
                    shown.start(name(config))
                    with _uninterrupted():
                        connection, process = _start(config)
                        running[connection] = process, config
                for connection in wait(list(running), POLL):
                    assert isinstance(connection, Connection)
                    process, config = running[connection]
                    event = _receive(connection)
                    if event is not None:
                        shown.update(name(config), event)
                        continue
                    process.join()
                    del running[connection]
                    assert process.exitcode is not None, "it has been waited for"
                    found = None if process.exitcode else read(config.folder)
                    if found:
                        shown.end(name(config), shown_metrics(found.values))
                    elif told and process.exitcode in (0, -signal.SIGTERM):
                        shown.end(name(config), "stopped, and saved as far as it was", failed=True)
                    else:
                        failures.append(failure(config, process.exitcode))
                        shown.end(name(config), f"failed, see {config.folder / LOG}", failed=True)
        finally:
            _stop([process for process, _ in running.values()], 0.0 if told else GRACE)
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
    """What a run's process does. The interrupt key is the study's to obey: it tells this process to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(config.folder / LOG, "ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    faulthandler.enable()

    def send(event: dict[str, Any]) -> None:
        try:
            connection.send(event)
        except BrokenPipeError as error:
            raise UserError("the process of the study is gone; the same command goes on with this run") from error

    sys.exit(perform(config, send))


def perform(config: RunConfig, send: Callable[[dict[str, Any]], None]) -> int:
    """Does a run in a process of its own, whose output is the run's log. Returns the exit status.

    Args: send: as `ForwardedProgress` takes it.
    """
    from cnext.training.runner import run

    try:
        run(config, ForwardedProgress(send))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER
    except Stopped as stopped:
        print(stamped(str(stopped)), file=sys.stderr)
        return stopped.status
    return 0


def _receive(connection: Connection) -> dict[str, Any] | None:
    """The next event; None when the process has ended, perhaps in the middle of one."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        connection.close()
        return None


def failure(config: RunConfig, exitcode: int) -> Failure:
    """What there is to say of a run whose process ended with an exit status, or by a signal where it is negative."""
    why = f"exit status {exitcode}" if exitcode else "told to stop, and saved as far as it was"
    if exitcode < 0:
        why = f"ended by signal {-exitcode}, {signal.strsignal(-exitcode)}"
        why += "; the system does this when memory runs out" if -exitcode == signal.SIGKILL else ""
    return Failure(config, USER if exitcode == USER else OTHER, why, end_of_log(config))


def end_of_log(config: RunConfig) -> list[str]:
    """The last lines of what a run has said."""
    log = config.folder / LOG
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if log.is_file() else []


def _stop(processes: list[SpawnProcess], grace: float) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(grace)
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
