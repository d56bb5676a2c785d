"""What a run shows while it goes on: bars with loss, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnext.running.config import Plan


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
        values = outcome["metrics"]
        shown = (("Avg.ACC", "avg_acc"), ("Forgetting", "forgetting"), ("New.ACC", "new_acc"))
        parts = [f"{label} {values[key]:.2f}" for label, key in shown if values[key] is not None]
        self.output.print("  ".join(parts), markup=False, soft_wrap=True)
        self.output.print(f"report: {report}", markup=False, soft_wrap=True)
