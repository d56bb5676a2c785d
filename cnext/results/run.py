"""The result of one run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cnext.analysis.run import Run
from cnext.errors import UserError, unknown
from cnext.results.display import Shown, View, data_frame, drawn, figure
from cnext.runs import results_file, schemas
from cnext.scoring.matrix import without_repeats
from cnext.tables.aggregate import METRICS

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

OF = ("scores", "metrics")


@dataclass(frozen=True, eq=False, repr=False)
class RunResult(Shown, Mapping[str, Any]):
    """The result of a run, finished or not. Scores are in percent, T is the number of tasks.

    It is also a mapping with the content of results.json, ``result["cost"]["optimizer_steps"]``, as `cnext.run`
    describes it, and equal to another with the same content.

    Attributes:
        folder: the run folder, with predictions, checkpoints and logs.
        content: the content of results.json.

    Example::

        result = cnext.run(cnext.RunConfig(method="mage", preset="smoke"))
        print(result)                    # the score matrix and the metrics; in a notebook, `result` alone
        result.metrics["forgetting"]
        result.plot().savefig("matrix.pdf")
    """

    folder: Path
    content: dict[str, Any] = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    @cached_property
    def _run(self) -> Run:
        file = self.folder / "results.json"
        return Run(self.folder, schemas.convert(self.content, schemas.Results, file))

    @property
    def method(self) -> str:
        return self._run.method

    @property
    def order(self) -> str:
        """The order of tasks as it was asked for; `tasks` has them."""
        return self._run.results.order

    @property
    def seed(self) -> int:
        return self._run.results.seed

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in training order."""
        return tuple(self._run.tasks)

    @property
    def finished(self) -> bool:
        """Whether every task was evaluated after the last stage."""
        return self._run.finished

    @property
    def score_matrix(self) -> np.ndarray:
        """(T, T) float64: the score on each task (column) after each stage (row); NaN where not evaluated."""
        return self._run.scores[1:].copy()

    @property
    def zero_shot(self) -> np.ndarray:
        """(T,) float64: the scores before training; NaN where nothing was trained."""
        return self._run.scores[0].copy()

    @property
    def metrics(self) -> dict[str, float | None]:
        """Every metric by name, None where it is undefined: see `cnext.scoring.matrix.metrics`."""
        return dict(self._run.results.metrics)

    @property
    def report(self) -> Path | None:
        """report.html in the run folder; None where it is not written."""
        return _existing(self.folder / "report.html")

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints after each task, which `RunConfig`'s ``init_from`` takes."""
        return sorted(path for path in self.folder.glob("checkpoints/*") if path.is_dir())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {figure(value)}" for name, value in self._main())
        state = "" if self.finished else ", unfinished"
        return f"<RunResult {self._name()}{state}: {shown}; {self.folder}>"

    def _name(self) -> str:
        return f"{self.method} on {self._run.results.suite}, order {self.order}, seed {self.seed}"

    def _main(self) -> list[tuple[str, float | None]]:
        return [(label, self._run.metric(name)) for name, label in METRICS.items()]

    def view(self) -> View:
        """What print, rich and notebooks show: the score matrix with the main metrics."""
        run = self._run
        rows, shades, bold = [], {}, set()
        for number, stage in enumerate(stages := [stage for stage in run.stages if self._known(stage)]):
            scores = run.scores[stage]
            learnt = [run.learnt(task) <= stage for task in range(len(run.tasks))] if stage else [True] * len(scores)
            seen = scores[np.array(learnt) & np.isfinite(scores)]
            mean = float(seen.mean()) if len(seen) else None
            rows.append([run.stage(stage), *map(figure, scores), figure(mean)])
            shades |= {(number, i + 1): v / 100 for i, v in enumerate(scores) if np.isfinite(v)}
            bold |= {(number, i + 1) for i in range(len(run.tasks)) if run.learnt(i) == stage}
        notes = [" · ".join(f"{label} {figure(value, 2)}" for label, value in self._main())]
        if run.results.budget == "smoke":
            notes.append("Preset smoke: a test that everything works; its scores mean nothing.")
        if not run.finished:
            notes.append(f"Unfinished: {len(stages)} of {len(run.stages)} stages are evaluated.")
        notes.append(f"Scores in percent; bold: the task just learnt. {self.report or self.folder}")
        head = ["after stage", *run.tasks, "mean of learnt"]
        return View(self._name(), head, rows, notes, shades=shades, bold=frozenset(bold))

    def _known(self, stage: int) -> bool:
        return bool(np.isfinite(self._run.scores[stage]).any())

    def to_dataframe(self, of: Literal["scores", "metrics"] = "scores") -> pandas.DataFrame:
        """The result as a pandas DataFrame. Those of several runs can be put together with ``pandas.concat``.

        Args:
            of: "scores": a row for each stage and task, with the columns method, order, seed, stage, trained, task,
                score; stage 0 is zero-shot. "metrics": one row with method, order, seed and every metric, NaN where it
                is undefined.

        Raises:
            UserError: pandas is not installed, or there is no such form.

        Example::

            result.to_dataframe().pivot(index="stage", columns="task", values="score")
        """
        return data_frame(self.records(of))

    def records(self, of: str = "scores") -> list[dict[str, Any]]:
        """The rows of `to_dataframe`, without pandas."""
        run = self._run
        key = {"method": self.method, "order": self.order, "seed": self.seed}
        if of == "metrics":
            names = without_repeats(self.metrics, self.metrics)
            # NaN, as None would make a column of numbers one of objects.
            return [key | {name: np.nan if (value := run.metric(name)) is None else value for name in names}]
        if of != "scores":
            raise unknown("form of a DataFrame", str(of), OF)
        return [
            key | {"stage": stage, "trained": run.stage(stage).split(" ", 1)[1], "task": task, "score": float(score)}
            for stage in run.stages
            for task, score in zip(run.tasks, run.scores[stage], strict=True)
            if np.isfinite(score)
        ]

    def plot(self) -> Figure:
        """The score matrix as a heat map, as in the report: a matplotlib Figure; ``savefig`` writes it to a file."""
        from cnext.report import plots

        run = self._run
        names = [run.stage(stage) for stage in run.stages]
        learnt = [run.stages.index(run.learnt(task)) for task in range(len(run.tasks))]
        caption = (
            f"{self._name()}: score in percent on each task (column) after each stage (row). Outlined: the task just "
            "learnt; small figures: the change since then."
        )
        return drawn(plots.score_matrix, run.scores[run.stages], names, run.tasks, learnt, caption=caption)


def _existing(file: Path) -> Path | None:
    return file if file.is_file() else None


def open_run(folder: str | os.PathLike[str]) -> RunResult:
    """The result of a run that was made before, in this process or by ``cnext-run``, from its folder.

    Raises:
        UserError: there is no results.json, or it is not what a run writes.

    Example::

        cnext.open_run("runs/mage/paper/seed-0")
    """
    path = Path(folder)
    file = path / "results.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the folder of one run, or open a study with cnext.open_study")
    content = results_file.read(file) or {}
    schemas.convert(content, schemas.Results, file)
    return RunResult(path, content)
