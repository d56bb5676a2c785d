"""What a run, or a study of several side by side, shows while it goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cnext import methods
from cnext.config.run_config import Plan
from cnext.monitoring import heartbeat
from cnext.monitoring.eta import RunPace, StudyPace, time_left
from cnext.monitoring.heartbeat import Heartbeat
from cnext.tables.aggregate import METRICS


def shown_metrics(values: dict[str, float | None]) -> str:
    return "  ".join(f"{label} {values[key]:.2f}" for key, label in METRICS.items() if values[key] is not None)


class Progress:
    """Shows a run: bars on standard error, results on standard output. ``with`` starts and stops the bars.

    Args: name, study: the run's name in the study that it is one of, and the study's pace.  quiet: shows nothing.
    """

    def __init__(self, name: str = "", study: StudyPace | None = None, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.name, self.study = name, study
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.output = Console(file=sys.stdout, highlight=False, quiet=quiet)
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
        self.doing = "loading"
        self.pace = RunPace([], False, 0, 0)
        self.folder: Path | None = None
        self.heartbeat: Heartbeat | None = None

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def kept_in(self, folder: Path) -> ExitStack:
        """Inside, the run's folder has a heartbeat and a log of what is said here; at the end, how the run ended."""
        self.folder, self.heartbeat = folder, Heartbeat(folder)
        stack = ExitStack()
        stack.push(self._ended)
        return stack

    def _ended(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        assert self.heartbeat is not None
        if error is None:
            self.heartbeat.end(heartbeat.FINISHED)
            return
        stopped = isinstance(error, KeyboardInterrupt)
        why = str(error) or type(error).__name__
        self.heartbeat.end(heartbeat.STOPPED if stopped else heartbeat.FAILED, why)
        self._log(why if stopped else f"error: {why}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self.folder is not None:
            heartbeat.log(self.folder, text)

    def _tell(self, doing: str, line: bool = False, **values: Any) -> None:
        """Says how far the run is to whoever looks into its folder. line: whether this is worth a line in a study."""
        self.doing = doing
        reckoned = self.pace.reckoned()
        if self.heartbeat is not None:
            self.heartbeat.beat(doing=doing, seconds_per_step=self.pace.steps.cost(1), **reckoned, **values)
        if self.study is not None:
            self.study.update(self.name, reckoned)
            self.bars.update(self.ids["study"], completed=self.study.ended, shown=time_left(self.study.left()))

    def plan(self, planned: Plan, tasks_done: int, step: int) -> None:
        """The overall bar: all optimizer steps of the run, those of an earlier process counted in."""
        steps = [planned.recipe.steps[name] for name in planned.order]
        self.pace = RunPace(steps, methods.load(planned.config.method).joint, tasks_done, step)
        if self.study is not None:
            self.ids["study"] = self.bars.add_task("all runs", total=self.study.total, shown="")
        self.ids["all"] = self.bars.add_task("all tasks", total=sum(steps), completed=self.pace.steps.done, shown="")
        self._tell("starting")

    def step(self, stage: int, name: str, row: dict[str, Any], steps: int) -> None:
        self.pace.step()
        if name not in self.ids:
            self.ids[name] = self.bars.add_task(f"{stage} {name}", total=steps, completed=row["step"] - 1, shown="")
            self.first_step, self.started = row["step"], time.perf_counter()
        done, seconds = row["step"] - self.first_step, time.perf_counter() - self.started
        rate = f"{done / seconds:5.1f} steps/s" if done else ""
        self.bars.update(self.ids[name], completed=row["step"], shown=f"loss {row['loss']:.3f} {rate}")
        self.bars.advance(self.ids["all"])
        doing = f"stage {stage} {name}: step {row['step']} of {steps}, loss {row['loss']:.3f}"
        self._tell(doing, stage=stage, task=name, step=row["step"], steps=steps)

    @contextmanager
    def evaluating(self, stage: int, trained: str, name: str, samples: int) -> Iterator[None]:
        shown = self.bars.add_task(f"  {name}", total=None, shown=f"evaluating {samples} samples")
        self._tell(f"after {stage} {trained}: answering {name}", stage=stage, task=trained)
        try:
            with self.pace.evaluation():
                yield
        finally:
            self.bars.remove_task(shown)

    def stage(self, stage: int, trained: str, rows: list[dict[str, Any]]) -> None:
        scores = "  ".join(f"{row['task']} {row['strict']:.1f}" for row in rows)
        mean = sum(row["strict"] for row in rows) / len(rows)
        self.say(f"after {stage} {trained}: {scores}  (mean {mean:.1f})")
        self._tell(f"after {stage} {trained}: mean {mean:.1f}", line=True, stage=stage, task=trained)

    def finished(self, outcome: dict[str, Any], report: Path) -> None:
        self.bars.stop()
        for text in (shown_metrics(outcome["metrics"]), f"report: {report}"):
            self.output.print(text, markup=False, soft_wrap=True)
            self._log(text)


class ForwardedProgress(Progress):
    """For a run in a process of its own, whose output is its log: how far it is goes to the study's process as well.

    send: takes {"doing": words, "line": whether this is worth a line} and what `RunPace.reckoned` says.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.send = send

    def say(self, text: str) -> None:
        self.console.print(heartbeat.stamped(text), markup=False, soft_wrap=True)

    def _log(self, text: str) -> None:
        """Nothing: what is printed is the log."""

    def _tell(self, doing: str, line: bool = False, **values: Any) -> None:
        super()._tell(doing, line, **values)
        self.send({"doing": doing, **self.pace.reckoned(), "line": line})


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
        self.pace = StudyPace(total, jobs)
        self.all = self.bars.add_task("all runs", total=float(total), left="", doing="")
        self.ids: dict[str, Any] = {}

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, name: str) -> None:
        self.pace.start(name)
        self.ids[name] = self.bars.add_task(name, total=1.0, left="", doing="loading")

    def update(self, name: str, event: dict[str, Any]) -> None:
        """What a run's ForwardedProgress has sent."""
        self.pace.update(name, event)
        left = time_left(event["left"])
        self.bars.update(self.ids[name], completed=event["share"], left=left, doing=event["doing"])
        self._show_all()
        if event["line"] and not self.console.is_terminal:
            self.say(f"{name}: {event['doing']}; {left}; all runs: {time_left(self.pace.left())}")

    def end(self, name: str, result: str, failed: bool = False) -> None:
        self.bars.remove_task(self.ids.pop(name))
        self.pace.end(name, failed)
        self._show_all()
        self.say(f"{name}: {result}  ({self.pace})")

    def _show_all(self) -> None:
        done = self.pace.ended + sum(event["share"] for event in self.pace.latest.values())
        doing = f"{self.pace.ended} of {self.pace.total} runs"
        self.bars.update(self.all, completed=done, left=time_left(self.pace.left()), doing=doing)
