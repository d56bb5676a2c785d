"""Means over seeds and orders and differences paired by seed, from run folders alone.

Needs neither torch nor numpy. `formats` writes the tables as Markdown, CSV, LaTeX or JSON.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import asdict
from msgspec.structs import replace as changed

from cnext.errors import UserError, unknown
from cnext.records import Record
from cnext.runs import data_alike, fingerprint, results_file, schemas
from cnext.runs.schemas import Cost, DataSummary, Percent

METRICS = {"avg_acc": "Avg.ACC", "forgetting": "Forgetting", "new_acc": "New.ACC"}
BASELINE = "lora"
RESAMPLES = 10_000
LEAST_PAIRS = 3
"""With fewer pairs there is no bootstrap interval."""


class Summary(Record):
    """A mean over n values. sd: sample standard deviation (n - 1).  low, high: a range or an interval."""

    n: int
    mean: float | None
    sd: float | None
    low: float | UnsetType | None = UNSET
    high: float | UnsetType | None = UNSET

    @property
    def ends(self) -> tuple[float, float] | None:
        """low and high, where known."""
        low, high = self.low, self.high
        return (low, high) if isinstance(low, float | int) and isinstance(high, float | int) else None


class Differences(Summary, kw_only=True):
    """A mean over n paired differences. above: the number of positive ones.  p: of the sign test, see `sign_test`."""

    above: int
    p: float | None


class SeedsRow(Record):
    """A method on one order, over seeds."""

    method: str
    order: str
    seeds: list[int]
    n: int
    avg_acc: Summary
    forgetting: Summary
    new_acc: Summary


class OrdersRow(Record):
    """A method over orders and seeds. low, high: the range of the orders' means."""

    method: str
    orders: list[str]
    n: int
    avg_acc: Summary
    forgetting: Summary
    new_acc: Summary


class DifferenceRow(Record):
    """A method minus the baseline, over pairs of the same order and seed.

    low, high: 95% bootstrap interval.  above, p: sign test.
    """

    method: str
    n: int
    avg_acc: Differences
    forgetting: Differences
    new_acc: Differences


class RunRow(Record):
    """The metrics of one run."""

    method: str
    order: str
    seed: int
    avg_acc: float | None
    forgetting: float | None
    new_acc: float | None


class StudyTables(Record):
    """All tables of a study. orders: of methods with several orders.  missing: names of unfinished runs."""

    setting: dict[str, Any]
    baseline: str
    rows: list[SeedsRow]
    orders: list[OrdersRow]
    differences: list[DifferenceRow]
    runs: list[RunRow]
    missing: list[str]
    notes: list[str] | UnsetType = UNSET


class TableResults(Record, kw_only=True):
    """What a table needs of results.json."""

    finished: bool
    method: str
    order: str
    seed: int
    tasks: list[str]
    hyperparameters: dict[str, Any]
    metrics: dict[str, Percent | None]
    cost: Cost
    fingerprint: dict[str, Any] | None = None
    data: dict[str, dict[str, DataSummary]] | None = None
    profile: Any = "strict"
    joint: Any = False
    score_matrix: Any = None
    zero_shot: Any = None
    error_matrix: Any = None
    writes: Any = None
    """What `columns` alone reads, and checks then."""

    def __post_init__(self) -> None:
        if self.cost.optimizer_steps is None or not METRICS.keys() <= self.metrics.keys():
            raise ValueError(f"Expected cost.optimizer_steps and metrics {', '.join(METRICS)}")


class Setting(Record):
    """What the runs of one table must have in common, in config.json. code: of those that have the same scorer.
    init_tasks: learnt by what a run started from; None where it started from new branches."""

    suite: str
    backbone: str
    split: str
    budget: str
    recipe: dict[str, Any]
    code: dict[str, str] = {}  # noqa: RUF012, which msgspec copies
    init_tasks: list[str] | None = None


SETTING = tuple(name for name in Setting.__struct_fields__ if name not in ("code", "init_tasks"))


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as far as a table needs it. values: by metric, None where the method has none. results: what was
    read of results.json."""

    folder: Path
    method: str
    order: str
    tasks: tuple[str, ...]
    seed: int
    hyperparameters: dict[str, Any]
    setting: dict[str, Any]
    values: dict[str, float | None]
    results: TableResults

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """Of the environment; None where the run is older than fingerprints."""
        return self.results.fingerprint

    @property
    def untrained(self) -> bool:
        """Whether nothing was learnt, so that nothing can be new or forgotten."""
        return not self.results.cost.optimizer_steps


@dataclass(frozen=True)
class Groups:
    """Comparable finished runs by method, order and seed.

    An order has one name, however it was asked for; a method's has the hyperparameters in which its runs differ.
    runs: all, with these names.  setting: what they have in common.  notes: on their environments and data.
    """

    cells: dict[str, dict[str, dict[int, FinishedRun]]]
    runs: list[FinishedRun]
    baseline: str
    setting: dict[str, Any]
    notes: list[str]


def find(paths: Iterable[Path]) -> list[Path]:
    """The run folders named, and those inside other folders named, each once. Symbolic links are followed.

    Raises: UserError where a path is no run folder and holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        inside, seen = [], set()
        for folder, folders, files in os.walk(path, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # by a link
                folders.clear()
                continue
            seen.add(real)
            folders.sort(key=lambda name, within=folder: (os.path.islink(os.path.join(within, name)), name))
            if "config.json" in files or "results.json" in files:
                inside.append(Path(folder))
                folders.clear()
        if not inside:
            raise UserError(f"{path} is no run folder and holds none; expected config.json and results.json")
        found |= {folder.resolve(): folder for folder in inside}
    return list(found.values())


def read(folder: Path) -> FinishedRun | None:
    """The run of a folder; None where it is not finished. Raises UserError where its files are damaged."""
    file = folder / "results.json"
    found = results_file.read(file)
    results = None if found is None else schemas.convert(found, TableResults, file)
    if results is None or not results.finished:
        return None
    setting = asdict(schemas.read(folder / "config.json", Setting))
    values = {metric: results.metrics[metric] for metric in METRICS}
    given = (results.method, results.order, tuple(results.tasks), results.seed, results.hyperparameters)
    run = FinishedRun(folder, *given, setting, values, results)
    return replace(run, values=values | {"forgetting": None, "new_acc": None}) if run.untrained else run


def finished(folders: Iterable[Path]) -> list[FinishedRun]:
    """The finished runs of these folders."""
    return [run for run in map(read, folders) if run]


def note_older(runs: Sequence[FinishedRun]) -> None:
    """Prints what is not known of results of an earlier version."""
    known = fingerprint.older([run.fingerprint for run in runs]), data_alike.older([run.results.data for run in runs])
    for line in filter(None, known):
        print(line, file=sys.stderr)


def of_folders(
    folders: Iterable[Path], baseline: str | None = None, mix: bool = False, mix_data: bool = False
) -> StudyTables:
    """``tabulate`` of the finished runs in these folders; the others are named."""
    found = {folder: read(folder) for folder in folders}
    missing = [str(folder) for folder, run in found.items() if run is None]
    return tabulate([run for run in found.values() if run], baseline, missing, mix, mix_data)


def check_comparable(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str] = SETTING) -> None:
    """Raises UserError where two runs differ in what a table must have in common. settings: by the runs' names."""
    (first, expected), *others = settings.items()
    for name, setting in others:
        found = [line for key in keys for line in _differences(expected[key], setting[key], key)]
        one, other = (each.get("code", {}) for each in (expected, setting))
        found += [line for key in one if key in other for line in _differences(one[key], other[key], f"code.{key}")]
        found += _differences(expected.get("init_tasks"), setting.get("init_tasks"), "init_tasks")
        if found:
            listed = "\n".join(f"  {line}" for line in found)
            raise UserError(f"{first} and {name} are not comparable, one table cannot hold both:\n{listed}")


def _differences(one: Any, other: Any, path: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [line for key in keys for line in _differences(one.get(key), other.get(key), f"{path}.{key}")]
    return [] if one == other else [f"{path}: {json.dumps(one)} and {json.dumps(other)}"]


def _labelled(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs with the hyperparameters in which those of one method differ added to its name."""
    labelled = []
    for run in runs:
        same = [other.hyperparameters for other in runs if other.method == run.method]
        varying = [key for key in run.hyperparameters if any(h.get(key) != run.hyperparameters[key] for h in same)]
        suffix = ", ".join(f"{key}={run.hyperparameters[key]}" for key in varying)
        labelled.append(replace(run, method=f"{run.method} ({suffix})" if suffix else run.method))
    return labelled


def group(
    runs: Sequence[FinishedRun], baseline: str | None = None, mix: bool = False, mix_data: bool = False
) -> Groups:
    """The runs of a study, grouped.

    Args: baseline: the method to compare with (None: lora where it is there, else the first).  mix: whether runs of
    different environments are averaged.  mix_data: whether runs on different data are.
    Raises: UserError for no runs, runs that are not comparable or of different environments or data, a run twice, or
        an unknown baseline.
    """
    if not runs:
        raise UserError("no finished run to make a table of")
    check_comparable({str(run.folder): run.setting for run in runs})
    notes = data_alike.check_alike({str(run.folder): run.results.data for run in runs}, mix_data)
    notes += fingerprint.check_alike({str(run.folder): run.fingerprint for run in runs}, mix)
    runs = _labelled(runs)
    once: dict[Any, FinishedRun] = {}
    for run in runs:
        other = once.setdefault((run.method, run.tasks, run.seed), run)
        if other is not run:
            raise UserError(f"{other.folder} and {run.folder} are the same run; name one of them")
    names: dict[tuple[str, ...], str] = {}
    runs = [replace(run, order=names.setdefault(run.tasks, run.order)) for run in runs]
    cells: dict[str, dict[str, dict[int, FinishedRun]]] = {}
    for run in runs:
        cells.setdefault(run.method, {}).setdefault(run.order, {})[run.seed] = run
    base = baseline or (BASELINE if BASELINE in cells else next(iter(cells)))
    if base not in cells:
        raise unknown("baseline", base, list(cells))
    setting = {key: runs[0].setting[key] for key in SETTING if key != "recipe"} | {"profile": "strict"}
    return Groups(cells, runs, base, setting, notes)


def tabulate(
    runs: Sequence[FinishedRun],
    baseline: str | None = None,
    missing: Sequence[str] = (),
    mix: bool = False,
    mix_data: bool = False,
) -> StudyTables:
    """The tables of a study. missing: names of runs that are not finished, for the notes. The rest is as in `group`."""
    study = group(runs, baseline, mix, mix_data)
    cells, base = study.cells, study.baseline
    return StudyTables(
        setting=study.setting,
        baseline=base,
        rows=[
            SeedsRow(method=method, order=order, seeds=sorted(seeds), n=len(seeds), **_means(list(seeds.values())))
            for method, orders in cells.items()
            for order, seeds in orders.items()
        ],
        orders=[_over_orders(method, orders) for method, orders in cells.items() if len(orders) > 1],
        differences=[_paired(method, cells[method], cells[base]) for method in cells if method != base],
        runs=[RunRow(r.method, r.order, r.seed, **r.values) for r in study.runs],
        missing=list(missing),
        notes=study.notes or UNSET,
    )


def summary(values: Sequence[float]) -> Summary:
    """n, mean and sample standard deviation (n - 1); None where undefined."""
    mean = math.fsum(values) / len(values) if values else None
    return Summary(len(values), mean, statistics.stdev(values) if len(values) > 1 else None)


def summary_with_range(values: Sequence[float], of: Sequence[float]) -> Summary:
    """n and mean of values, with the least and the greatest of others in place of the deviation."""
    return changed(summary(values), sd=None, low=min(of, default=None), high=max(of, default=None))


def _known(runs: Iterable[FinishedRun], metric: str) -> list[float]:
    return [value for run in runs if (value := run.values[metric]) is not None]


def _means(runs: Sequence[FinishedRun]) -> dict[str, Summary]:
    return {metric: summary(_known(runs, metric)) for metric in METRICS}


def _over_orders(method: str, orders: dict[str, dict[int, FinishedRun]]) -> OrdersRow:
    every = [run for seeds in orders.values() for run in seeds.values()]
    found = {}
    for metric in METRICS:
        means = [summary(of).mean for seeds in orders.values() if (of := _known(seeds.values(), metric))]
        found[metric] = summary_with_range(_known(every, metric), [mean for mean in means if mean is not None])
    return OrdersRow(method=method, orders=list(orders), n=len(every), **found)


def _paired(
    method: str, cells: dict[str, dict[int, FinishedRun]], base: dict[str, dict[int, FinishedRun]]
) -> DifferenceRow:
    pairs = [
        (run.values, base[order][seed].values)
        for order, seeds in cells.items()
        for seed, run in seeds.items()
        if seed in base.get(order, {})
    ]
    found = {}
    for metric in METRICS:
        values = [(a[metric], b[metric]) for a, b in pairs]
        known = [here - there for here, there in values if here is not None and there is not None]
        low, high = interval(known)
        above, p = sign_test(known)
        mean = summary(known)
        found[metric] = Differences(mean.n, mean.mean, mean.sd, low, high, above=above, p=p)
    return DifferenceRow(method=method, n=len(pairs), **found)


def sign_test(differences: Sequence[float]) -> tuple[int, float | None]:
    """How many differences are positive, and the p-value of the exact two-sided sign test.

    Zeros are left out. p is at least 2^(1 - n) for n differences, 0.25 for three; None without differences.

    Reference: Dixon and Mood, The Statistical Sign Test, 1946.

    Example:
        >>> sign_test([1.0, 0.5, 2.0, -0.1])
        (3, 0.625)
    """
    above, n = sum(value > 0 for value in differences), sum(value != 0 for value in differences)
    if not n:
        return above, None
    tail = sum(math.comb(n, k) for k in range(max(above, n - above), n + 1)) / 2**n
    return above, min(1.0, 2 * tail)


@functools.cache
def _resamples(n: int) -> list[list[int]]:
    draw = random.Random(0)
    return [draw.choices(range(n), k=n) for _ in range(RESAMPLES)]


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95% percentile bootstrap interval of the mean, the same each time; (None, None) below ``LEAST_PAIRS`` values.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    n = len(values)
    if n < LEAST_PAIRS:
        return None, None
    means = sorted(math.fsum(map(values.__getitem__, indices)) / n for indices in _resamples(n))
    outside = round(0.025 * RESAMPLES)
    return means[outside], means[-1 - outside]
