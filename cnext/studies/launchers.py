"""Studies beyond one machine: every run a job of a Ray cluster, or of Slurm through submitit.

A job starts a process of its own in the folder that the study was started in, with the study's Python and its import
path, which are there under the same paths, as are the data and the folder of the runs: on a shared file system. It
writes what a run on this machine writes, its log included, and goes on where an earlier one stopped, so that results
and resuming are the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cnext.config.run_config import Plan, RunConfig
from cnext.errors import UserError
from cnext.monitoring import heartbeat
from cnext.monitoring.progress import StudyProgress, shown_metrics
from cnext.monitoring.signals import Stop
from cnext.runs import command_line
from cnext.studies.local import OTHER, TAIL, Failure, end_of_log, failure, name
from cnext.tables.aggregate import read

PACKAGES = {"ray": "ray", "slurm": "submitit"}
POLL = 1.0
"""Seconds between two looks at the jobs."""
LOOK = 0.2
"""Seconds between two looks of a job at its run's process."""
GRACE = 60.0
"""Seconds that a run has to save where it is when it is told to stop."""
DAY = 24 * 60
JOB = "import sys; sys.path[:] = {path!r}; from cnext.studies.worker import main; sys.exit(main({file!r}))"
"""What Python does in a job. With -m, a cnext that lies in the folder would come before the study's own."""
SHOWN = ("doing", "share", "left", "whole")


@dataclass(frozen=True)
class Work:
    """What a job does where it is started: the run, in a process whose output is the run's log."""

    command: tuple[str, ...]
    folder: str
    log: str

    def __call__(self) -> int:
        """Returns the exit status of the run."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            # Not wait(), which an engine that interrupts this thread without a signal does not wake.
            while process.poll() is None:
                time.sleep(LOOK)
            return process.returncode
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()

    def checkpoint(self) -> Any:
        """submitit's: what to put into the queue again when the time is up or the node is wanted. The run goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Ended(NamedTuple):
    """How a job ended: the run's exit status, or what became of the job instead of one."""

    status: int | None
    why: str = ""


class Engine(Protocol):
    """What does the jobs. A handle is whatever ``submit`` gives."""

    def submit(self, work: Work, config: RunConfig, device: str) -> Any: ...

    def ended(self, handle: Any) -> Ended | None:
        """None while the job waits or runs."""

    def cancel(self, handle: Any) -> None: ...

    def close(self) -> None: ...


class RayEngine:
    """Jobs of the cluster that options name ("address"), or $RAY_ADDRESS; of one on this machine where none is named.

    All other options are those of a Ray task: num_cpus, num_gpus, memory, resources and so on.
    """

    def __init__(self, options: dict[str, Any], _: Path) -> None:
        # Ray reads these when it is imported. It asks nobody whether it may report how it is used.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Releases between two ways to treat a task without a GPU warn unless one is chosen: the newer.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self.ray, self.options = ray, dict(options)
        address = self.options.pop("address", None) or os.environ.get("RAY_ADDRESS")
        own: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **own)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"expected a Ray cluster at {address}, got: {error}") from error

    def submit(self, work: Work, config: RunConfig, device: str) -> Any:
        # A worker is used once: nothing that a run leaves in a process can reach the next.
        needed = {"num_cpus": config.threads, "num_gpus": int(device.startswith("cuda")), "max_calls": 1}
        try:
            return self.ray.remote(**(needed | self.options))(_do).remote(work)
        except (ValueError, TypeError) as error:
            raise UserError(f"--launcher-option expects options of a Ray task, or address: {error}") from error

    def ended(self, handle: Any) -> Ended | None:
        if not self.ray.wait([handle], timeout=0)[0]:
            return None
        try:
            return Ended(self.ray.get(handle))
        except (self.ray.exceptions.RayError, KeyboardInterrupt) as error:
            return Ended(None, f"Ray: {error}")

    def cancel(self, handle: Any) -> None:
        self.ray.cancel(handle)

    def close(self) -> None:
        self.ray.shutdown()


def _do(work: Work) -> int:
    return work()


class SlurmEngine:
    """Jobs of submitit's executor, with its own names as options: slurm_partition, timeout_min, mem_gb and so on.

    The option cluster=local tries a study out without Slurm, all of it at once on this machine.
    """

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import submitit
        from submitit.core import utils

        self.errors = utils
        self.options: dict[str, Any] = {"timeout_min": DAY} | options
        cluster = self.options.pop("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder / ".submitit", cluster=cluster)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UserError(f"expected Slurm's commands on this machine, got: {error}") from error

    def submit(self, work: Work, config: RunConfig, device: str) -> Any:
        needed: dict[str, Any] = {"name": "cnext", "cpus_per_task": config.threads}
        if device.startswith("cuda"):
            needed["gpus_per_node"] = 1
        try:
            self.executor.update_parameters(**(needed | self.options))
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"--launcher-option expects parameters of submitit, or cluster: {error}") from error
        try:
            return self.executor.submit(work)
        except self.errors.FailedJobError as error:
            raise UserError(f"Slurm does not take the job: {error}") from error

    def ended(self, handle: Any) -> Ended | None:
        if not handle.done():
            return None
        try:
            return Ended(handle.result())
        except (self.errors.UncompletedJobError, self.errors.FailedJobError) as error:
            return Ended(None, f"{handle.state}: {error}")

    def cancel(self, handle: Any) -> None:
        handle.cancel(check=False)

    def close(self) -> None:
        """Nothing stays open."""


ENGINES: dict[str, Callable[[dict[str, Any], Path], Engine]] = {"ray": RayEngine, "slurm": SlurmEngine}


def options(given: Sequence[str]) -> dict[str, Any]:
    """Options from "key=value"; a value that reads as a number is one.

    Raises: UserError for anything else, and for a key that is there twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"--launcher-option expects key=value, got {text!r}")
        if key in found:
            raise UserError(f"--launcher-option has {key} more than once")
        found[key] = _number(value)
    return found


def _number(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def require(launcher: str) -> None:
    """Raises UserError where the launcher's package is not installed."""
    package = PACKAGES[launcher]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--launcher {launcher} needs the package {package}; pip install 'cnext[{launcher}]'")


def launch(launcher: str, plans: list[Plan], given: dict[str, Any], jobs: int) -> list[Failure]:
    """Does runs as jobs, at most ``jobs`` of them submitted at a time. The run folders are there.

    However this ends, no job is left behind. Told to stop, every run saves where it is before this raises Stopped.
    """
    require(launcher)
    with interruptible():
        engine = ENGINES[launcher](given, plans[0].config.out.absolute())
    waiting, failures, told = list(reversed(plans)), [], False
    running: dict[Any, RunConfig] = {}
    with Stop() as stop, stop.held(), StudyProgress(len(plans), jobs) as shown:
        try:
            while waiting or running:
                if stop.requested and not told:
                    told, waiting = True, []
                    for handle in running:
                        engine.cancel(handle)
                while waiting and len(running) < jobs:
                    planned = waiting.pop()
                    with interruptible():
                        running[_submit(engine, planned)] = planned.config
                    shown.start(name(planned.config))
                for handle, config in list(running.items()):
                    ended = engine.ended(handle)
                    if ended is None:
                        _show(shown, config)
                        continue
                    del running[handle]
                    found = read(config.folder) if ended.status == 0 else None
                    if found:
                        shown.end(name(config), shown_metrics(found.values))
                    elif told:
                        shown.end(name(config), "stopped, and saved as far as it was", failed=True)
                    else:
                        failures.append(_failure(config, ended))
                        shown.end(name(config), f"failed, see {config.folder / heartbeat.LOG}", failed=True)
                time.sleep(POLL)
        finally:
            for handle in running:
                engine.cancel(handle)
            engine.close()
    return failures


@contextmanager
def interruptible() -> Iterator[None]:
    """Processes started inside hear SIGINT, by which engines cancel jobs. Those of a shell's background jobs do not."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _submit(engine: Engine, planned: Plan) -> Any:
    # The device as this machine has resolved it: "auto" could be another one where the job runs.
    config = dataclasses.replace(planned.config, device=planned.device)
    file = command_line.write(config).absolute()
    code = JOB.format(path=[os.path.abspath(entry) for entry in sys.path], file=str(file))
    log = (config.folder / heartbeat.LOG).absolute()
    return engine.submit(Work((sys.executable, "-c", code), os.getcwd(), str(log)), config, planned.device)


def _show(shown: StudyProgress, config: RunConfig) -> None:
    """Shows how far a run says that it is, once it does."""
    beat = heartbeat.read(config.folder)
    if beat is not None and beat["state"] == heartbeat.RUNNING and "share" in beat:
        shown.update(name(config), {key: beat[key] for key in SHOWN} | {"line": False})


def _failure(config: RunConfig, ended: Ended) -> Failure:
    if ended.status is not None:
        return failure(config, ended.status)
    lines = [*ended.why.splitlines()[-TAIL:], *end_of_log(config)]
    return Failure(config, OTHER, "its job ended without a result", lines)
