"""What a run, or a study of several side by side, shows while it goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnext import methods
from cnext.running.config import Plan
from cnext.running.tables import METRICS


def duration(seconds: float) -> str:
    """Seconds in two units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def time_left(seconds: float | None) -> str:
    return "time left not known yet" if seconds is None else f"{duration(seconds)} left"


def shown_metrics(values: dict[str, float | None]) -> str:
    return "  ".join(f"{label} {values[key]:.2f}" for key, label in METRICS.items() if values[key] is not None)


class Progress:
    """Shows a run: bars on standard error, results on standard output. ``with`` starts and stops the bars."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True, highlight=False)
        self.output = Console(file=sys.stdout, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.ids: dict[str, Any] = {}
        self.first_step, self.started = 0, 0.0

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def plan(self, planned: Plan, tasks_done: int, step: int) -> None:
        """The overall bar: all optimizer steps of the run, those of an earlier process counted in."""
        steps = [planned.recipe.steps[name] for name in planned.order]
        self.ids["all"] = self.bars.add_task(
            "all tasks", total=sum(steps), completed=sum(steps[:tasks_done]) + step, shown=""
        )

    def step(self, stage: int, name: str, row: dict[str, Any], steps: int) -> None:
        if name not in self.ids:
            self.ids[name] = self.bars.add_task(f"{stage} {name}", total=steps, completed=row["step"] - 1, shown="")
            self.first_step, self.started = row["step"], time.perf_counter()
        done, seconds = row["step"] - self.first_step, time.perf_counter() - self.started
        rate = f"{done / seconds:5.1f} steps/s" if done else ""
        self.bars.update(self.ids[name], completed=row["step"], shown=f"loss {row['loss']:.3f} {rate}")
        self.bars.advance(self.ids["all"])

    @contextmanager
    def evaluating(self, stage: int, trained: str, name: str, samples: int) -> Iterator[None]:
        shown = self.bars.add_task(f"  {name}", total=None, shown=f"evaluating {samples} samples")
        try:
            yield
        finally:
            self.bars.remove_task(shown)

    def stage(self, stage: int, trained: str, rows: list[dict[str, Any]]) -> None:
        scores = "  ".join(f"{row['task']} {row['strict']:.1f}" for row in rows)
        mean = sum(row["strict"] for row in rows) / len(rows)
        self.say(f"after {stage} {trained}: {scores}  (mean {mean:.1f})")

    def finished(self, outcome: dict[str, Any], report: Path) -> None:
        self.bars.stop()
        self.output.print(shown_metrics(outcome["metrics"]), markup=False, soft_wrap=True)
        self.output.print(f"report: {report}", markup=False, soft_wrap=True)


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


class ForwardedProgress(Progress):
    """For a run in a process of its own: lines go into its log, and how far it is to the study's process.

    send: takes {"doing": words, "share": of the run that is done, "left": seconds it still takes, "whole": seconds all
    of it takes, "line": whether this is worth a line}; seconds are None while they cannot be known.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.send = send
        self.steps = self.evaluations = _Work(0, 0)
        self.last_step: float | None = None

    def plan(self, planned: Plan, tasks_done: int, step: int) -> None:
        super().plan(planned, tasks_done, step)
        steps = [planned.recipe.steps[name] for name in planned.order]
        tasks = len(steps)
        # Zero-shot and the stages after it: each answers the tasks seen so far, joint training has one stage of all.
        seen = [tasks, tasks] if methods.load(planned.config.method).joint else [tasks, *range(1, tasks + 1)]
        begun = tasks_done or step
        self.steps = _Work(sum(steps), sum(steps[:tasks_done]) + step)
        self.evaluations = _Work(sum(seen), sum(seen[: tasks_done + 1]) if begun else 0)
        self._forward("starting")

    def step(self, stage: int, name: str, row: dict[str, Any], steps: int) -> None:
        super().step(stage, name, row, steps)
        now = time.perf_counter()
        self.steps.add(now - self.last_step if self.last_step is not None else None)
        self.last_step = now
        self._forward(f"stage {stage} {name}: step {row['step']} of {steps}, loss {row['loss']:.3f}")

    @contextmanager
    def evaluating(self, stage: int, trained: str, name: str, samples: int) -> Iterator[None]:
        self.last_step, started = None, time.perf_counter()
        self._forward(f"after {stage} {trained}: answering {name}")
        with super().evaluating(stage, trained, name, samples):
            yield
        self.evaluations.add(time.perf_counter() - started)

    def stage(self, stage: int, trained: str, rows: list[dict[str, Any]]) -> None:
        super().stage(stage, trained, rows)
        self._forward(f"after {stage} {trained}: mean {sum(row['strict'] for row in rows) / len(rows):.1f}", line=True)

    def _forward(self, doing: str, line: bool = False) -> None:
        work = (self.steps, self.evaluations)
        wholes = [each.cost(each.total) for each in work]
        lefts = [each.cost(each.total - each.done) for each in work]
        whole = None if None in wholes else sum(wholes)
        left = None if None in lefts else sum(lefts)
        counted = sum(each.done for each in work) / max(1, sum(each.total for each in work))
        share = 1 - left / whole if whole and left is not None else counted
        self.send({"doing": doing, "share": share, "left": left, "whole": whole, "line": line})


class StudyProgress:
    """Shows the runs under way, a bar or lines for each, and the study as a whole with the time left."""

    def __init__(self, total: int, jobs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}  {task.fields[doing]}", markup=False),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self.total, self.jobs, self.ended = total, jobs, 0
        self.all = self.bars.add_task("all runs", total=float(total), left="", doing="")
        self.ids: dict[str, Any] = {}
        self.started: dict[str, float] = {}
        self.latest: dict[str, dict[str, Any]] = {}
        self.wholes: dict[str, float] = {}

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, name: str) -> None:
        self.started[name] = time.perf_counter()
        self.ids[name] = self.bars.add_task(name, total=1.0, left="", doing="loading")

    def update(self, name: str, event: dict[str, Any]) -> None:
        """What a run's ForwardedProgress has sent."""
        self.latest[name] = event
        if event["whole"]:
            self.wholes[name] = event["whole"]
        left = time_left(event["left"])
        self.bars.update(self.ids[name], completed=event["share"], left=left, doing=event["doing"])
        self._show_all()
        if event["line"] and not self.console.is_terminal:
            self.say(f"{name}: {event['doing']}; {left}; all runs: {time_left(self.left())}")

    def end(self, name: str, result: str, failed: bool = False) -> None:
        self.bars.remove_task(self.ids.pop(name))
        self.latest.pop(name, None)
        if not failed:
            # With what loading took; of a run that went on from a checkpoint, the whole that it had estimated.
            self.wholes[name] = max(self.wholes.get(name, 0.0), time.perf_counter() - self.started[name])
        self.ended += 1
        self._show_all()
        self.say(f"{name}: {result}  ({self.ended} of {self.total} runs done; {time_left(self.left())})")

    def left(self) -> float | None:
        """Seconds until the last run ends; a run of which nothing is known takes the mean of the others."""
        waiting = self.total - self.ended - len(self.ids)
        mean = sum(self.wholes.values()) / len(self.wholes) if self.wholes else None
        lefts = [self.latest[name]["left"] if name in self.latest else None for name in self.ids] + [None] * waiting
        known = [mean if left is None else left for left in lefts]
        return None if None in known else max([sum(known) / self.jobs, *known], default=0.0)

    def _show_all(self) -> None:
        done = self.ended + sum(event["share"] for event in self.latest.values())
        doing = f"{self.ended} of {self.total} runs"
        self.bars.update(self.all, completed=done, left=time_left(self.left()), doing=doing)
