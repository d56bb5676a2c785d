"""Progress of a run or a study, and the heartbeat in the run folder.

On a terminal it is bars, in a notebook a bar that is updated in place, and plain lines elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnext.config.plan import Plan
from cnext.monitoring import heartbeat
from cnext.monitoring.eta import Estimate, RunEta, StudyEta, time_left
from cnext.monitoring.heartbeat import Heartbeat
from cnext.monitoring.notebook import Bars as NotebookBars
from cnext.monitoring.notebook import Row, in_notebook
from cnext.tables.aggregate import METRICS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


@dataclass(frozen=True)
class Event:
    """How far a run is, for the process of its study. line: whether it is worth a line where there are no bars."""

    doing: str
    estimate: Estimate
    line: bool = False


def shown_metrics(values: Mapping[str, float | None]) -> str:
    """The metrics of a finished run in one line."""
    return "  ".join(f"{label} {values[key]:.2f}" for key, label in METRICS.items() if values[key] is not None)


def console(stderr: bool, quiet: bool = False) -> Console:
    """A console without colors in lines. In a notebook it writes plain lines to standard output, which is not red."""
    from rich.console import Console

    if in_notebook():
        return Console(file=sys.stdout, highlight=False, quiet=quiet, force_jupyter=False, force_terminal=False)
    return Console(stderr=stderr, file=None if stderr else sys.stdout, highlight=False, quiet=quiet)


def all_runs(study: StudyEta) -> Row:
    """How far the runs of a study are together."""
    done = study.ended + sum(estimate.share for estimate in study.latest.values())
    return Row(
        "all runs", done / max(1, study.total), f"{study.ended} of {study.total} done; {time_left(study.left())}"
    )


class Progress:
    """Shows a run: bars on standard error, which the context starts and stops, and results on standard output.

    Args:
        name: of the run in its study.
        study: of which the run is one, for its time left.
        quiet: show nothing.
    """

    def __init__(self, name: str = "", study: StudyEta | None = None, quiet: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.name, self.study = name, study
        self.console, self.output = console(True, quiet), console(False, quiet)
        self.notebook = NotebookBars(in_notebook() and not quiet)
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
        self.ids: dict[str, TaskID] = {}
        self.first_step, self.started = 0, 0.0
        self.doing = "loading"
        self.eta = RunEta([], [], 0, 0)
        self.folder: Path | None = None
        self.heartbeat: Heartbeat | None = None

    def __enter__(self) -> Progress:
        self.bars.start()
        self.notebook.show([Row(self.name, 0.0, self.doing)])
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
        self.notebook.stop()

    def kept_in(self, folder: Path) -> ExitStack:
        """Context that keeps a heartbeat and a log in the run folder, and writes there how the run ended."""
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
        """Shows a line, and logs it."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self.folder is not None:
            heartbeat.log(self.folder, text)

    def _report(self, doing: str, line: bool = False, **values: Any) -> None:
        """Updates the heartbeat and the study's time left. line: as in `Event`.  values: fields of `Beat`."""
        self.doing, estimate = doing, self.eta.estimate()
        if self.heartbeat is not None:
            values |= {"seconds_per_step": self.eta.steps.cost(1), **asdict(estimate)}
            self.heartbeat.update(doing=doing, **values)
        if self.study is not None:
            self.study.update(self.name, estimate)
            self.bars.update(self.ids["study"], completed=self.study.ended, shown=time_left(self.study.left()))
        rows = [Row(self.name, estimate.share, f"{doing}; {time_left(estimate.left)}")]
        self.notebook.show(rows if self.study is None else [*rows, all_runs(self.study)])

    def plan(self, planned: Plan, tasks_done: int, step: int) -> None:
        """Starts the bar of all optimizer steps of the run. tasks_done, step: where the run starts or resumes."""
        steps = [planned.recipe.steps[name] for name in planned.order]
        self.eta = RunEta(steps, planned.evaluations, tasks_done, step)
        if self.study is not None:
            self.ids["study"] = self.bars.add_task("all runs", total=self.study.total, shown="")
        self.ids["all"] = self.bars.add_task("all tasks", total=sum(steps), completed=self.eta.steps.done, shown="")
        self._report("starting")

    def step(self, stage: int, name: str, step: int, steps: int, loss: float) -> None:
        """An optimizer step of a task, counted from 1, is done."""
        self.eta.step()
        if name not in self.ids:
            self.ids[name] = self.bars.add_task(f"{stage} {name}", total=steps, completed=step - 1, shown="")
            self.first_step, self.started = step, time.perf_counter()
        done, seconds = step - self.first_step, time.perf_counter() - self.started
        rate = f"{done / seconds:5.1f} steps/s" if done else ""
        self.bars.update(self.ids[name], completed=step, shown=f"loss {loss:.3f} {rate}")
        self.bars.advance(self.ids["all"])
        doing = f"stage {stage} {name}: step {step} of {steps}, loss {loss:.3f}"
        self._report(doing, stage=stage, task=name, step=step, steps=steps)

    def measuring(self, what: str) -> None:
        """The run does something else than training and evaluating."""
        self._report(what)

    @contextmanager
    def evaluating(self, stage: int, trained: str, name: str, samples: int) -> Iterator[None]:
        """Context in which a task is evaluated after a stage. trained: name of the stage."""
        shown = self.bars.add_task(f"  {name}", total=None, shown=f"evaluating {samples} samples")
        self._report(f"after {stage} {trained}: answering {name}", stage=stage, task=trained)
        try:
            with self.eta.evaluation():
                yield
        finally:
            self.bars.remove_task(shown)

    def stage(self, stage: int, trained: str, scores: Mapping[str, float]) -> None:
        """A stage is evaluated. scores: in percent, by task."""
        mean = sum(scores.values()) / len(scores)
        listed = "  ".join(f"{task} {score:.1f}" for task, score in scores.items())
        self.say(f"after {stage} {trained}: {listed}  (mean {mean:.1f})")
        self._report(f"after {stage} {trained}: mean {mean:.1f}", line=True, stage=stage, task=trained)

    def finished(self, metrics: Mapping[str, float | None], report: Path) -> None:
        """The run is finished. report: path of its report."""
        self.bars.stop()
        for text in (shown_metrics(metrics), f"report: {report}"):
            self.output.print(text, markup=False, soft_wrap=True)
            self._log(text)


class ForwardedProgress(Progress):
    """Progress of a run in a subprocess, whose output is the run's log. send: called with each event."""

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__()
        self.send = send

    def say(self, text: str) -> None:
        self.console.print(heartbeat.stamped(text), markup=False, soft_wrap=True)

    def _log(self, text: str) -> None:
        """Nothing, since the output is the log."""

    def _report(self, doing: str, line: bool = False, **values: Any) -> None:
        super()._report(doing, line, **values)
        self.send(Event(doing, self.eta.estimate(), line))


class StudyProgress:
    """Shows each run of a study that is under way, by a bar or lines, and the time left of them all."""

    def __init__(self, total: int, jobs: int) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = console(True)
        self.notebook = NotebookBars(in_notebook())
        self.rows: dict[str, Row] = {}
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}  {task.fields[doing]}", markup=False),
            console=self.console,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self.eta = StudyEta(total, jobs)
        self.all = self.bars.add_task("all runs", total=float(total), left="", doing="")
        self.ids: dict[str, TaskID] = {}

    def __enter__(self) -> StudyProgress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
        self.notebook.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, name: str) -> None:
        self.eta.start(name)
        self.ids[name] = self.bars.add_task(name, total=1.0, left="", doing="loading")
        self.rows[name] = Row(name, 0.0, "loading")
        self._show_all()

    def update(self, name: str, event: Event) -> None:
        """Shows an event of a run's `ForwardedProgress`."""
        self.eta.update(name, event.estimate)
        left = time_left(event.estimate.left)
        self.bars.update(self.ids[name], completed=event.estimate.share, left=left, doing=event.doing)
        self.rows[name] = Row(name, event.estimate.share, f"{event.doing}; {left}")
        self._show_all()
        if event.line and not self.console.is_terminal:
            self.say(f"{name}: {event.doing}; {left}; all runs: {time_left(self.eta.left())}")

    def end(self, name: str, result: str, failed: bool = False) -> None:
        self.bars.remove_task(self.ids.pop(name))
        del self.rows[name]
        self.eta.end(name, failed)
        self._show_all()
        self.say(f"{name}: {result}  ({self.eta})")

    def _show_all(self) -> None:
        done = self.eta.ended + sum(estimate.share for estimate in self.eta.latest.values())
        doing = f"{self.eta.ended} of {self.eta.total} runs"
        self.bars.update(self.all, completed=done, left=time_left(self.eta.left()), doing=doing)
        self.notebook.show([*self.rows.values(), all_runs(self.eta)])
