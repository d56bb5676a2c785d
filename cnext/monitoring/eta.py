"""Estimate the time left of a run or a study (ETA) from the steps and evaluations timed so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """How far a run is. share: of its time, 0 to 1.  left, whole: seconds, None while they are unknown."""

    share: float
    left: float | None
    whole: float | None


def duration(seconds: float) -> str:
    """Seconds in words, in two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def time_left(seconds: float | None) -> str:
    return "time left unknown" if seconds is None else f"{duration(seconds)} left"


def study_left(lefts: Sequence[float | None], wholes: Sequence[float], jobs: int) -> float | None:
    """Seconds until the last of several runs ends, ``jobs`` at a time; None while nothing is known.

    Args:
        lefts: seconds left of each unfinished run; None, if unknown, is replaced by the mean of ``wholes``.
        wholes: seconds that whole runs take.
    """
    mean = sum(wholes) / len(wholes) if wholes else None
    known = [each for left in lefts if (each := mean if left is None else left) is not None]
    return None if len(known) < len(lefts) else max([sum(known) / jobs, *known], default=0.0)


@dataclass
class _Work:
    """Steps or evaluations of a run: how many in total, how many done, and the seconds of those that were timed."""

    total: int
    done: int
    timed: int = 0
    seconds: float = 0.0

    def add(self, seconds: float | None) -> None:
        self.done += 1
        if seconds is not None:
            self.timed, self.seconds = self.timed + 1, self.seconds + seconds

    def cost(self, count: int) -> float | None:
        """Seconds of ``count`` of them; None while none has been timed."""
        if count <= 0:
            return 0.0
        return count * self.seconds / self.timed if self.timed else None


class RunEta:
    """Time left of a run.

    Args:
        steps: optimizer steps of each task.
        evaluated: how many tasks each stage is evaluated on, from stage 0 on.
        tasks_done, step: where the run starts.
    """

    def __init__(self, steps: Sequence[int], evaluated: Sequence[int], tasks_done: int, step: int) -> None:
        self.steps = _Work(sum(steps), sum(steps[:tasks_done]) + step)
        self.evaluations = _Work(sum(evaluated), sum(evaluated[: tasks_done + 1]) if tasks_done or step else 0)
        self._last: float | None = None

    def step(self) -> None:
        """A step is done. The first one after other work is not timed."""
        now = time.perf_counter()
        self.steps.add(now - self._last if self._last is not None else None)
        self._last = now

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Context in which a task is evaluated."""
        self._last, started = None, time.perf_counter()
        yield
        self.evaluations.add(time.perf_counter() - started)

    def estimate(self) -> Estimate:
        work = (self.steps, self.evaluations)
        wholes, lefts = [each.cost(each.total) for each in work], [each.cost(each.total - each.done) for each in work]
        whole = None if None in wholes else sum(each or 0.0 for each in wholes)
        left = None if None in lefts else sum(each or 0.0 for each in lefts)
        counted = sum(each.done for each in work) / max(1, sum(each.total for each in work))
        return Estimate(1 - left / whole if whole and left is not None else counted, left, whole)


class StudyEta:
    """Time left of ``total`` runs, ``jobs`` at a time, from the estimates of those under way."""

    def __init__(self, total: int, jobs: int) -> None:
        self.total, self.jobs, self.ended = total, jobs, 0
        self.started: dict[str, float] = {}
        self.latest: dict[str, Estimate] = {}
        self.wholes: dict[str, float] = {}

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()

    def update(self, name: str, estimate: Estimate) -> None:
        self.latest[name] = estimate
        if estimate.whole:
            self.wholes[name] = estimate.whole

    def end(self, name: str, failed: bool) -> None:
        self.latest.pop(name, None)
        seconds = time.perf_counter() - self.started.pop(name)
        if not failed:
            # Loading included. A resumed run took less than its whole, which it has estimated.
            self.wholes[name] = max(self.wholes.get(name, 0.0), seconds)
        self.ended += 1

    def left(self) -> float | None:
        """Seconds until the last run ends; runs of which nothing is known take the mean of the others."""
        waiting = self.total - self.ended - len(self.started)
        lefts = [self.latest[name].left if name in self.latest else None for name in self.started]
        return study_left([*lefts, *[None] * waiting], list(self.wholes.values()), self.jobs)

    def __str__(self) -> str:
        return f"{self.ended} of {self.total} runs done; {time_left(self.left())}"
