"""How far a run or a study is, and how long it still takes, from what has been timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


def duration(seconds: float) -> str:
    """Seconds in two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def time_left(seconds: float | None) -> str:
    return "time left not known yet" if seconds is None else f"{duration(seconds)} left"


def study_left(lefts: Sequence[float | None], wholes: Sequence[float], jobs: int) -> float | None:
    """Seconds until the last of several runs ends, ``jobs`` at a time; None while nothing is known.

    Args: lefts: of the runs not finished; None for one of which nothing is known, which takes the mean of ``wholes``.
    """
    mean = sum(wholes) / len(wholes) if wholes else None
    known = [each for left in lefts if (each := mean if left is None else left) is not None]
    return None if len(known) < len(lefts) else max([sum(known) / jobs, *known], default=0.0)


def _total(costs: Sequence[float | None]) -> float | None:
    """The sum; None where one of them is not known."""
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


@dataclass
class _Work:
    """Steps or evaluations of a run: how many there are, how many are done, and what those timed took."""

    total: int
    done: int
    timed: int = 0
    seconds: float = 0.0

    def add(self, seconds: float | None) -> None:
        self.done += 1
        if seconds is not None:
            self.timed, self.seconds = self.timed + 1, self.seconds + seconds

    def cost(self, count: int) -> float | None:
        """Seconds that ``count`` of them take; None while none has been timed."""
        if count <= 0:
            return 0.0
        return count * self.seconds / self.timed if self.timed else None


class RunPace:
    """A run's pace.

    Args: steps: optimizer steps of each task.  joint: whether all are learnt at once.  tasks_done, step: where it
        begins.
    """

    def __init__(self, steps: Sequence[int], joint: bool, tasks_done: int, step: int) -> None:
        tasks = len(steps)
        # Zero-shot and the stages after it: each answers the tasks seen so far, joint training has one stage of all.
        seen = [tasks, tasks] if joint else [tasks, *range(1, tasks + 1)]
        self.steps = _Work(sum(steps), sum(steps[:tasks_done]) + step)
        self.evaluations = _Work(sum(seen), sum(seen[: tasks_done + 1]) if tasks_done or step else 0)
        self._last: float | None = None

    def step(self) -> None:
        """A step is done. The first after anything else is not timed: other work is in it."""
        now = time.perf_counter()
        self.steps.add(now - self._last if self._last is not None else None)
        self._last = now

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, a task is answered."""
        self._last, started = None, time.perf_counter()
        yield
        self.evaluations.add(time.perf_counter() - started)

    def reckoned(self) -> dict[str, float | None]:
        """{"share" of the run that is done, "left": seconds it still takes, "whole": seconds all of it takes};
        seconds are None while they cannot be known."""
        work = (self.steps, self.evaluations)
        whole = _total([each.cost(each.total) for each in work])
        left = _total([each.cost(each.total - each.done) for each in work])
        counted = sum(each.done for each in work) / max(1, sum(each.total for each in work))
        return {"share": 1 - left / whole if whole and left is not None else counted, "left": left, "whole": whole}


class StudyPace:
    """The pace of ``total`` runs, ``jobs`` at a time, from what `RunPace.reckoned` says of those under way."""

    def __init__(self, total: int, jobs: int) -> None:
        self.total, self.jobs, self.ended = total, jobs, 0
        self.started: dict[str, float] = {}
        self.latest: dict[str, dict[str, Any]] = {}
        self.wholes: dict[str, float] = {}

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()

    def update(self, name: str, reckoned: dict[str, Any]) -> None:
        self.latest[name] = reckoned
        if reckoned["whole"]:
            self.wholes[name] = reckoned["whole"]

    def end(self, name: str, failed: bool) -> None:
        self.latest.pop(name, None)
        seconds = time.perf_counter() - self.started.pop(name)
        if not failed:
            # With what loading took; of a run that went on from a checkpoint, the whole that it had estimated.
            self.wholes[name] = max(self.wholes.get(name, 0.0), seconds)
        self.ended += 1

    def left(self) -> float | None:
        """Seconds until the last run ends; a run of which nothing is known takes the mean of the others."""
        waiting = self.total - self.ended - len(self.started)
        lefts = [self.latest[name]["left"] if name in self.latest else None for name in self.started]
        return study_left([*lefts, *[None] * waiting], list(self.wholes.values()), self.jobs)

    def __str__(self) -> str:
        return f"{self.ended} of {self.total} runs done; {time_left(self.left())}"
