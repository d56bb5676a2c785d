"""The result of a study: several methods, orders or seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cnext.errors import UserError, unknown
from cnext.results.display import Shown, View, data_frame, drawn
from cnext.results.run import RunResult, _existing, open_run
from cnext.tables import aggregate
from cnext.tables.aggregate import METRICS, RunRow, SeedsRow, StudyTables
from cnext.tables.formats import cell

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class StudyResult(Shown):
    """The result of a study: its finished runs, and the means of each method over seeds and orders.

    Attributes:
        folder: holds the run folders, and study.html and the tables where they are written.
        runs: the finished runs.
        tables: all tables of `cnext.tables`; ``tables.rows`` has a row for each method and order.

    Example::

        study = cnext.study(cnext.RunConfig(preset="smoke"), ["lora", "mage"], seeds=[0, 1])
        print(study)                     # mean and deviation of each method; in a notebook, `study` alone
        study.row("mage").avg_acc.mean
        study.to_dataframe().groupby(["method", "task"]).score.mean()
    """

    folder: Path
    runs: tuple[RunResult, ...] = field(repr=False)
    tables: StudyTables = field(repr=False)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.method for row in self.tables.rows))

    @property
    def orders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.order for row in self.tables.rows))

    @property
    def report(self) -> Path | None:
        """study.html in the folder; None where it is not written."""
        return _existing(self.folder / "study.html")

    def row(self, method: str, order: str | None = None) -> SeedsRow:
        """The means of a method: ``avg_acc``, ``forgetting`` and ``new_acc``, each with mean, sd and n.

        Args:
            order: needed where the method has several.

        Raises:
            UserError: the study has no such method or order, or the order is not named.
        """
        rows = {row.order: row for row in self.tables.rows if row.method == method}
        if not rows:
            raise unknown("method of the study", method, self.methods)
        if order is None:
            if len(rows) > 1:
                raise UserError(f"{method} has several orders, {', '.join(rows)}: name one, row({method!r}, ORDER)")
            return next(iter(rows.values()))
        if order not in rows:
            raise unknown(f"order of {method}", order, list(rows))
        return rows[order]

    def __repr__(self) -> str:
        name, label = next(iter(METRICS.items()))
        shown = ", ".join(f"{self._name(row)} {cell(getattr(row, name), decimals=1)}" for row in self.tables.rows)
        return f"<StudyResult {len(self.runs)} runs on {self.tables.setting['suite']}: {label} {shown}; {self.folder}>"

    def _name(self, row: SeedsRow) -> str:
        return row.method if len(self.orders) == 1 else f"{row.method}, {row.order}"

    def view(self) -> View:
        """What print, rich and notebooks show: mean and deviation of each method."""
        words = ["method"] if len(self.orders) == 1 else ["method", "order"]
        rows = [
            [*(getattr(row, word) for word in words), str(row.n), *(cell(getattr(row, name)) for name in METRICS)]
            for row in self.tables.rows
        ]
        setting = self.tables.setting
        notes = ["Mean ± sample standard deviation of n runs; scores in percent."]
        if setting["budget"] == "smoke":
            notes.append("Preset smoke: a test that everything works; its scores mean nothing.")
        if self.tables.missing:
            notes.append(f"Not finished and left out: {', '.join(self.tables.missing)}.")
        notes += [*(self.tables.notes or []), str(self.report or self.folder)]
        many = len(self.methods) > 1
        title = f"{len(self.methods)} methods" if many else self.methods[0]
        title += f" on {setting['suite']}, backbone {setting['backbone']}, preset {setting['budget']}"
        return View(title, [*words, "n", *METRICS.values()], rows, notes, words=len(words))

    def to_dataframe(self, of: Literal["scores", "metrics"] = "scores") -> pandas.DataFrame:
        """All runs as a pandas DataFrame: `RunResult.to_dataframe` of each, one below the other.

        Raises:
            UserError: pandas is not installed, or there is no such form.

        Example::

            study.to_dataframe("metrics").groupby("method").forgetting.agg(["mean", "std"])
        """
        # The table's names, which tell apart runs of one method with other hyperparameters.
        named = [(run, {"method": as_named.method, "order": as_named.order}) for run, as_named in self._named()]
        return data_frame([{**row, **names} for run, names in named for row in run.records(of)])

    def _named(self) -> Iterator[tuple[RunResult, RunRow]]:
        return zip(self.runs, self.tables.runs, strict=True)

    def plot(self) -> Figure:
        """Avg.ACC of each method, best first, as in the report: a matplotlib Figure.

        A tick for each seed, a dot for their mean, an open dot for New.ACC.
        """
        from cnext.report import study_plots

        found: dict[str, tuple[list[float], float | None]] = {}
        for row in self.tables.rows:
            runs = [run for run in self.tables.runs if (run.method, run.order) == (row.method, row.order)]
            if seeds := [run.avg_acc for run in runs if run.avg_acc is not None]:
                found[self._name(row)] = (seeds, row.new_acc.mean)
        best_first = sorted(found.items(), key=lambda item: -sum(item[1][0]) / len(item[1][0]))
        caption = "Avg.ACC in percent: a tick for each seed, a dot for their mean; open dot: New.ACC."
        values = [value for seeds, new in found.values() for value in (*seeds, new) if value is not None]
        limits = (min(values, default=0.0), max(values, default=100.0))
        return drawn(study_plots.accuracy, dict(best_first), "", limits, caption=caption)


def of_folders(
    folders: Sequence[Path],
    out: Path,
    baseline: str | None = None,
    mix_environments: bool = False,
    mix_data: bool = False,
) -> StudyResult:
    """The study of these run folders. Raises UserError as `open_study`."""
    tables = aggregate.of_folders(folders, baseline, mix_environments, mix_data)
    finished = [run for folder in folders if (run := aggregate.read(folder))]
    return StudyResult(out, tuple(open_run(run.folder) for run in finished), tables)


def open_study(
    *folders: str | os.PathLike[str],
    baseline: str | None = None,
    mix_environments: bool = False,
    mix_data: bool = False,
) -> StudyResult:
    """The result of runs that were made before, in this process or by ``cnext-run``, as a study.

    Args:
        folders: run folders, or folders that contain some.
        baseline: the method that ``tables.differences`` compares with; None: lora if it is there, else the first.
        mix_environments: average over runs made on different processors, versions or thread counts.
        mix_data: average over runs on different data.

    Raises:
        UserError: there is no finished run, runs are not comparable or of different environments or data, or a file is
            damaged.

    Example::

        cnext.open_study("runs")
    """
    paths = [Path(folder) for folder in folders or ("runs",)]
    out = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths]))
    return of_folders(aggregate.find(paths), out, baseline, mix_environments, mix_data)
