"""Run jobs in sequence or in parallel subprocesses; failures are isolated."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from cnext.config.plan import Plan
from cnext.config.run_config import RunConfig
from cnext.errors import RESUME, UserError
from cnext.monitoring.eta import StudyEta
from cnext.monitoring.heartbeat import LOG, stamped
from cnext.monitoring.notebook import note
from cnext.monitoring.progress import Event, ForwardedProgress, Progress, StudyProgress, shown_metrics
from cnext.monitoring.signals import Stop, Stopped
from cnext.monitoring.streams import escape_unencodable
from cnext.tables.aggregate import read

TAIL = 12
"""Lines of a failed run's log that are printed."""
GRACE = 5.0
"""Seconds that a process has to end after SIGTERM, before SIGKILL."""
POLL = 0.2
"""Seconds between two checks for a signal."""
USER_ERROR, CRASH = 2, 1
"""Exit statuses: an error that the user can fix, and any other."""


@dataclass(frozen=True)
class Failure:
    """A failed run: ``USER_ERROR`` or ``CRASH``, the reason, and the last lines of its log."""

    config: RunConfig
    status: int
    reason: str
    lines: list[str]

    def __str__(self) -> str:
        head = f"failed: {name(self.config)} ({self.reason}), run folder {self.config.folder}"
        return "\n".join([head, *(f"    {line}" for line in self.lines)])


def name(config: RunConfig) -> str:
    """The name of a run in its study: method/order/seed-N."""
    return str(config.folder.relative_to(config.out))


def run_in_sequence(plans: list[Plan]) -> list[Failure]:
    """Executes runs one after another in this process; errors of one do not stop the next. Returns the failed ones."""
    from cnext.training.runner import run

    failures, eta = [], StudyEta(len(plans), 1)
    for planned in plans:
        label, before = name(planned.config), len(failures)
        eta.start(label)
        try:
            run(planned.config, Progress(label, eta))
        except (UserError, OSError) as error:
            failures.append(Failure(planned.config, USER_ERROR, "error", [f"error: {error}"]))
        except (RuntimeError, MemoryError) as error:
            lines = traceback.format_exc().splitlines()[-TAIL:]
            failures.append(Failure(planned.config, CRASH, type(error).__name__, lines))
        eta.end(label, failed=len(failures) > before)
        note(f"{label}: {'failed' if len(failures) > before else 'done'}  ({eta})")
    return failures


def run_in_parallel(plans: list[Plan], jobs: int) -> list[Failure]:
    """Executes ``jobs`` runs at a time, each in its own process with its log in ``<run folder>/run.log``.

    The run folders exist already. No process outlives this function. On SIGTERM or SIGINT every run saves a checkpoint
    before this raises Stopped; a second SIGINT does not wait for that.

    Returns:
        The failed runs.
    """
    waiting, failures, stopping = list(reversed(plans)), [], False
    running: dict[Connection, tuple[SpawnProcess, RunConfig]] = {}
    with Stop() as stop, stop.deferred(), StudyProgress(len(plans), jobs) as shown:
        try:
            while waiting or running:
                if stop.requested and not stopping:
                    stopping, waiting = True, []
                    for process, _ in running.values():
                        process.terminate()
                while waiting and len(running) < jobs:
                    config = waiting.pop().config
                    shown.start(name(config))
                    with _sigint_ignored():
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
                    assert process.exitcode is not None, "join() returned"
                    stopped = stopping and process.exitcode in (0, -signal.SIGTERM)
                    failures += show_end(shown, failure(config, process.exitcode), process.exitcode == 0, stopped)
        finally:
            _stop([process for process, _ in running.values()], 0.0 if stopping else GRACE)
    return failures


def show_end(shown: StudyProgress, failed: Failure, succeeded: bool, stopped: bool) -> list[Failure]:
    """Shows how a run ended. Returns its failure, unless it has results or was stopped."""
    config = failed.config
    if succeeded and (found := read(config.folder)):
        shown.end(name(config), shown_metrics(found.values))
        return []
    text = "stopped, and progress saved" if stopped else f"failed, see {config.folder / LOG}"
    shown.end(name(config), text, failed=True)
    return [] if stopped else [failed]


def _start(config: RunConfig) -> tuple[Connection, SpawnProcess]:
    # Spawned, as neither torch's threads nor CUDA survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, theirs), name=name(config))
    process.start()
    theirs.close()
    return ours, process


def _run(config: RunConfig, connection: Connection) -> None:
    """Main function of a run's process. The study handles SIGINT, and stops this process by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(config.folder / LOG, "ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    escape_unencodable()
    faulthandler.enable()

    def send(event: Event) -> None:
        try:
            connection.send(event)
        except BrokenPipeError as error:
            raise UserError(f"the process of the study is gone; {RESUME}") from error

    sys.exit(run_logged(config, send))


def run_logged(config: RunConfig, send: Callable[[Event], None]) -> int:
    """Executes a run in a process whose output is the run's log. Returns the exit status.

    Args:
        send: receives progress events, see `ForwardedProgress`.
    """
    from cnext.training.runner import run

    try:
        run(config, ForwardedProgress(send))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stopped:
        print(stamped(str(stopped)), file=sys.stderr)
        return stopped.status
    return 0


def _receive(connection: Connection) -> Event | None:
    """The next event; None once the process has ended, possibly while sending one."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        connection.close()
        return None


def failure(config: RunConfig, exitcode: int) -> Failure:
    """The failure of a run whose process ended with this exit code, negative for a signal."""
    reason = f"exit status {exitcode}" if exitcode else "stopped by a signal, and progress saved"
    if exitcode < 0:
        reason = f"ended by signal {-exitcode}, {signal.strsignal(-exitcode)}"
        reason += "; the system does this when memory runs out" if -exitcode == signal.SIGKILL else ""
    return Failure(config, USER_ERROR if exitcode == USER_ERROR else CRASH, reason, end_of_log(config))


def end_of_log(config: RunConfig) -> list[str]:
    """The last ``TAIL`` lines of a run's log."""
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
def _sigint_ignored() -> Iterator[None]:
    """Inside, started processes ignore SIGINT from the beginning. Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
