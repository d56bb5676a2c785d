"""Run studies as jobs of a Ray cluster, or of Slurm through submitit.

Every run is a job. It starts a process in the working directory of the study, with the same Python and import path, so
these, the data and the run folders must be on a shared file system. Results, logs and resuming are as in local runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cnext.config.plan import Plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.monitoring import heartbeat
from cnext.monitoring.eta import Estimate
from cnext.monitoring.progress import Event, StudyProgress
from cnext.monitoring.signals import Stop
from cnext.runs import command_line
from cnext.studies.local import CRASH, TAIL, Failure, end_of_log, failure, name, show_end

PACKAGES = {"ray": "ray", "slurm": "submitit"}
POLL = 1.0
"""Seconds between two polls of the jobs."""
PROCESS_POLL = 0.2
"""Seconds between two polls of a job for its run's process."""
GRACE = 60.0
"""Seconds that a run has after SIGTERM to save a checkpoint, before SIGKILL."""
DAY = 24 * 60
JOB = "import sys; sys.path[:] = {path!r}; from cnext.studies.worker import main; sys.exit(main({file!r}))"
"""Code of a job's process. With -m, a cnext package in the working directory would be imported instead."""


@dataclass(frozen=True)
class Work:
    """A job: executes a run in a process whose output is the run's log."""

    command: tuple[str, ...]
    folder: str
    log: str

    def __call__(self) -> int:
        """Executes the run. Returns its exit status."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            # Ray interrupts this thread without a signal, which does not end process.wait().
            while process.poll() is None:
                time.sleep(PROCESS_POLL)
            return process.returncode
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()

    def checkpoint(self) -> Any:
        """Called by submitit on timeout or preemption: requeues the job, and the run resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Ended(NamedTuple):
    """The end of a job: the run's exit status, or why there is none."""

    status: int | None
    reason: str = ""


class Engine(Protocol):
    """Interface to a job system."""

    def submit(self, work: Work, config: RunConfig, device: str) -> Any:
        """Submits a job. Returns a handle."""

    def ended(self, handle: Any) -> Ended | None:
        """The end of the job; None while it is pending or running."""

    def cancel(self, handle: Any) -> None:
        """Stops the job by SIGTERM to its run."""

    def close(self) -> None:
        """Disconnects."""


class RayEngine:
    """Tasks of a Ray cluster: that of the option "address", else of $RAY_ADDRESS, else a local one.

    The other options are those of a Ray task: num_cpus, num_gpus, memory, resources and so on.
    """

    def __init__(self, options: dict[str, Any], _: Path) -> None:
        # Ray reads these at import. Usage reports to its makers are off unless the user turns them on.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Some releases warn unless one of two ways to treat tasks without a GPU is chosen; this is the newer one.
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
        # One run per worker process, so that runs do not share state.
        needed = {"num_cpus": config.threads, "num_gpus": int(device.startswith("cuda")), "max_calls": 1}
        try:
            return self.ray.remote(**(needed | self.options))(_call).remote(work)
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


def _call(work: Work) -> int:
    return work()


class SlurmEngine:
    """Jobs of submitit, with its parameters as options: slurm_partition, timeout_min, mem_gb and so on.

    The option cluster=local executes all jobs at once on this machine, to try a study without Slurm.
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
            raise UserError(f"Slurm rejects the job: {error}") from error

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
        """Does nothing: submitit keeps no connection."""


ENGINES: dict[str, Callable[[dict[str, Any], Path], Engine]] = {"ray": RayEngine, "slurm": SlurmEngine}


def options(given: Sequence[str]) -> dict[str, Any]:
    """Parses options of the form key=value; numbers become int or float.

    Raises:
        UserError: an option has another form, or a key is repeated.
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
    """Raises UserError if the launcher's package is not installed."""
    package = PACKAGES[launcher]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--launcher {launcher} needs the package {package}; pip install 'cnext[{launcher}]'")


def launch(launcher: str, plans: list[Plan], given: dict[str, Any], jobs: int) -> list[Failure]:
    """Executes runs as jobs, at most ``jobs`` submitted at a time. The run folders exist already.

    No job outlives this function. On SIGTERM or SIGINT every run saves a checkpoint before this raises Stopped.

    Returns:
        The failed runs.
    """
    require(launcher)
    with interruptible():
        engine = ENGINES[launcher](given, plans[0].config.out.absolute())
    waiting, failures, stopping = list(reversed(plans)), [], False
    running: dict[Any, RunConfig] = {}
    with Stop() as stop, stop.deferred(), StudyProgress(len(plans), jobs) as shown:
        try:
            while waiting or running:
                if stop.requested and not stopping:
                    stopping, waiting = True, []
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
                    failures += show_end(shown, _failure(config, ended), ended.status == 0, stopping)
                time.sleep(POLL)
        finally:
            for handle in running:
                engine.cancel(handle)
            engine.close()
    return failures


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, started processes receive SIGINT, by which engines cancel jobs, also if this process ignores it.

    Shells start background jobs with SIGINT ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    ignored = main and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _submit(engine: Engine, planned: Plan) -> Any:
    # The device as resolved here: "auto" could be another one on the machine of the job.
    config = dataclasses.replace(planned.config, device=planned.device)
    file = command_line.write(config).absolute()
    code = JOB.format(path=[os.path.abspath(entry) for entry in sys.path], file=str(file))
    log = (config.folder / heartbeat.LOG).absolute()
    return engine.submit(Work((sys.executable, "-c", code), os.getcwd(), str(log)), config, planned.device)


def _show(shown: StudyProgress, config: RunConfig) -> None:
    """Shows the progress of a run from its heartbeat, if there is one."""
    beat = heartbeat.read(config.folder)
    if beat is not None and beat.state == heartbeat.RUNNING and beat.share is not None:
        shown.update(name(config), Event(beat.doing, Estimate(beat.share, beat.left, beat.whole)))


def _failure(config: RunConfig, ended: Ended) -> Failure:
    if ended.status is not None:
        return failure(config, ended.status)
    lines = [*ended.reason.splitlines()[-TAIL:], *end_of_log(config)]
    return Failure(config, CRASH, "the job ended without a result", lines)
