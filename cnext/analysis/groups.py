"""Group comparable finished runs by method and order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from cnext.analysis.run import Run
from cnext.tables import aggregate
from cnext.tables.aggregate import StudyTables, Summary


def means(rows: Sequence[Iterable[float | None]]) -> list[Summary]:
    """n, mean and sample standard deviation of each column over runs (rows); NaN and None are left out."""
    return [
        aggregate.summary([float(v) for v in column if v is not None and not isnan(v)])
        for column in zip(*rows, strict=True)
    ]


@dataclass(frozen=True)
class Group:
    """The runs of one method on one order, by seed. method: with the hyperparameters in which its runs differ."""

    method: str
    order: str
    runs: list[Run]

    @property
    def tasks(self) -> list[str]:
        return self.runs[0].tasks

    def mean(self, figure: Callable[[Run], float | None]) -> Summary:
        """n, mean and sample standard deviation of a value over the runs that have it."""
        return aggregate.summary([value for run in self.runs if (value := figure(run)) is not None])


@dataclass(frozen=True)
class RunGroups:
    """Comparable finished runs. tables: empty for one run alone."""

    groups: list[Group]
    tables: StudyTables

    @classmethod
    def read(
        cls, folders: Iterable[Path], baseline: str | None = None, mix: bool = False, mix_data: bool = False
    ) -> RunGroups:
        """Reads run folders; those that are not finished are named in ``tables.missing``.

        Args: mix: whether runs of different environments are averaged, and noted.  mix_data: the same of other data.
        Raises:
            UserError: no run is finished, files are damaged, a run is there twice, two runs are not comparable, or
                their environments or data differ.
        """
        listed = {folder: aggregate.read(folder) for folder in folders}
        finished = [run for run in listed.values() if run]
        missing = [str(folder) for folder, run in listed.items() if run is None]
        table = aggregate.tabulate(finished, baseline, missing, mix, mix_data)
        runs = {str(run.folder): Run.read(run.folder) for run in finished}
        aggregate.check_comparable(
            {name: {key: getattr(run.results, key) for key in ("profile", "samples")} for name, run in runs.items()},
            ("profile", "samples"),
        )
        groups: dict[tuple[str, str], dict[int, Run]] = {}
        for row, run in zip(table.runs, runs.values(), strict=True):
            groups.setdefault((row.method, row.order), {})[row.seed] = run
        in_order = [(row.method, row.order) for row in table.rows]
        return cls([Group(*key, [run for _, run in sorted(groups[key].items())]) for key in in_order], table)

    @classmethod
    def of(cls, run: Run) -> RunGroups:
        """One run alone, finished or not."""
        return cls([Group(run.method, run.results.order, [run])], StudyTables({}, "", [], [], [], [], []))

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def single(self) -> Run | None:
        """The run, if there is only one."""
        return self.runs[0] if len(self.runs) == 1 else None
