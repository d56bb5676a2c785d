"""Report sections of a study: its methods compared over seeds and orders (study.html)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cnext.analysis import Analysis
from cnext.analysis.error_types import TYPES
from cnext.analysis.groups import Group, RunGroups, means
from cnext.analysis.overall import BY_OUTPUT, at_end, averages, forgettings
from cnext.analysis.result import ResultTable
from cnext.analysis.run import points
from cnext.analysis.transfer import changes, in_turn
from cnext.report import plots, study_plots, validity
from cnext.report.analyses import missing, table, without
from cnext.report.blocks import Block, Code, Folded, Key, Numbers, Picture, Plots, Section, Table, Text
from cnext.report.scores import MEANING
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS
from cnext.tables.aggregate import METRICS
from cnext.tables.formats import blocks as study_tables

ROWS = 200
"""Of a folded table; a longer one is in analysis.md alone."""
PICTURES = 30
"""With more methods and orders than this, each has a picture in one order only: the page stays below 1 MB."""


def sections(study: RunGroups, analysis: Analysis, command: str) -> list[Section]:
    """All sections that the runs have files for; a section without its files says which. command: writes it again."""
    page, done = Page(study, analysis), analysis.tables
    found = [
        *(_head(page), _overview(page), _tasks(page), _stages(page), _types(page), _transfer(page)),
        page.section("breaks", "Forgotten samples", page.first),
        *([] if page.same else [page.section("orders", "Orders", page.last)]),
        *([page.section("ablations", "Ablation")] if "ablations" in done else []),
        *([page.section("seeds", "Seeds", page.only_first)] if "seeds" in done else []),
        page.section("drift", "Adapter updates", page.first),
        Section(validity.TITLE, validity.blocks(page.analysis.tables["validity"], page.table)),
        *(_metrics(), _reproduction(page, command)),
    ]
    return [section for section in found if section.blocks]


@dataclass(frozen=True)
class Page:
    """A study and its analyses."""

    study: RunGroups
    analysis: Analysis

    @property
    def same(self) -> tuple[str, ...]:
        """The columns that have one value in all rows."""
        return ("order",) if len({group.order for group in self.study.groups}) == 1 else ()

    @property
    def orders(self) -> dict[str, list[Group]]:
        """The groups of each order: first that of the most methods, of several the paper's, a suite's default."""
        found: dict[str, list[Group]] = {}
        for group in self.study.groups:
            found.setdefault(group.order, []).append(group)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0] != "paper")))

    @property
    def main(self) -> tuple[str, list[Group]]:
        """The order of the most methods, and those of them that learn one task after another."""
        order, groups = next(iter(self.orders.items()))
        return order, [group for group in groups if in_turn(group.runs[0])]

    @property
    def drawn(self) -> tuple[list[Group], str]:
        """The groups with a picture each, and their order where only those of the main order have one, else ""."""
        groups = [group for group in self.study.groups if in_turn(group.runs[0])]
        order, of_main = self.main
        if len(groups) <= PICTURES or not of_main or len(of_main) == len(groups):
            return groups, ""
        return of_main, order

    def name(self, method: str, order: str) -> str:
        return method if self.same else f"{method}, {order}"

    def section(self, what: str, title: str, show: Callable[[list[ResultTable]], list[Block]] | None = None) -> Section:
        """The section of an analysis: its tables, or what ``show`` makes of them, or a note on what it lacks."""
        found = self.analysis.tables.get(what)
        if found is None:
            learning = any(map(in_turn, self.study.runs))
            return Section(title, [missing(self.analysis.left_out[what])] if learning else [])
        return Section(title, show(found) if show else [self.table(one) for one in found])

    def first(self, found: list[ResultTable]) -> list[Block]:
        """The first table shown, the others folded, or named where they are too long."""
        short = [one for one in found[1:] if len(one.rows) <= ROWS]
        long = [one for one in found[1:] if one not in short]
        return [self.table(found[0]), *(Folded(one.title, self.table(one)) for one in short), *_elsewhere(long)]

    def only_first(self, found: list[ResultTable]) -> list[Block]:
        """The first table folded, of the others where they are."""
        return [Folded(found[0].title, self.table(found[0])), *_elsewhere(found[1:])]

    def last(self, found: list[ResultTable]) -> list[Block]:
        """The last table shown, the others folded."""
        return [self.table(found[-1]), *(Folded(one.title, self.table(one)) for one in found[:-1])]

    def table(self, result: ResultTable) -> Table:
        return table(result, self.same)


def _head(page: Page) -> Section:
    setting = page.study.tables.setting
    orders = list(dict.fromkeys(group.order for group in page.study.groups))
    seeds = sorted({run.results.seed for run in page.study.runs})
    facts = [f"backbone {setting['backbone']}", f"preset {setting['budget']}", f"split {setting['split']}"]
    facts += [f"order {', '.join(orders)}", f"seeds {', '.join(map(str, seeds))}", f"{len(page.study.runs)} runs"]
    blocks: list[Block] = [Text(" · ".join(facts), "facts")]
    if setting["budget"] == "smoke":
        blocks.append(Text("Preset smoke: a test that everything works; its scores mean nothing.", "banner"))
    if page.study.tables.missing:
        blocks.append(Text(f"Unfinished and left out: {', '.join(page.study.tables.missing)}", "banner"))
    blocks += [Text(note, "banner") for note in page.study.tables.notes or []]
    methods = list(dict.fromkeys(group.method for group in page.study.groups))
    title = f"{f'{len(methods)} methods' if methods[1:] else methods[0]} on {setting['suite']}"
    return Section(title, [*blocks, *_leaders(page)])


def _leaders(page: Page) -> list[Block]:
    """The best of each main metric among the methods that learn one task after another, in the main order."""
    order, groups = page.main
    found = {}
    for metric, best in (("avg_acc", max), ("forgetting", min), ("new_acc", max)):
        known = {group.method: group.mean(lambda run, metric=metric: run.metric(metric)) for group in groups}
        means = {method: of.mean for method, of in known.items() if of.mean is not None}
        if not means:
            return []
        method = best(means, key=lambda name: means[name])
        found[metric] = (method, known[method])
    several = len(groups) > 1
    words = {"avg_acc": "highest", "forgetting": "least", "new_acc": "highest"}
    numbers = []
    for metric, (method, of) in found.items():
        whose = f"{words[metric]}, by {method}: " if several else ""
        numbers.append((METRICS[metric], points(of.mean), f"{whose}{MEANING[metric]}"))
    where = "" if page.same else f" in the order {order}"
    if not several:
        return [Numbers(numbers), Text(f"Means of {found['avg_acc'][1].n} runs{where}.")]
    (method, of), spread = found["avg_acc"], ""
    if of.sd is not None:
        spread = f", with a standard deviation of {of.sd:.1f} over {of.n} seeds"
    note = (
        f"Of {len(groups)} methods that learn the tasks one after another{where}, {method} has the highest score at "
        f"the end{spread}. A method that learns little has little to forget: read Forgetting beside New.ACC."
    )
    return [Numbers(numbers), Text(note)]


def _overview(page: Page) -> Section:
    rows: dict[str, dict[str, tuple[list[float], float | None]]] = {}
    for order, groups in page.orders.items():
        for group in groups:
            seeds = [value for run in group.runs if (value := run.metric("avg_acc")) is not None]
            if seeds:
                new = group.mean(lambda run: run.metric("new_acc")).mean
                rows.setdefault(order, {})[group.method] = (seeds, new)
    values = [
        value for of in rows.values() for seeds, new in of.values() for value in (*seeds, new) if value is not None
    ]
    pictures = []
    for number, (order, of) in enumerate(rows.items(), 1):
        best = dict(sorted(of.items(), key=lambda row: -np.mean(row[1][0])))
        spoken = "; ".join(f"{name} {np.mean(seeds):.1f}" for name, (seeds, _) in best.items())
        title = "" if page.same else f"order {order}"
        drawn = study_plots.accuracy(best, title, (min(values), max(values)))
        pictures.append(
            Picture(f"avg_acc_{number}.svg", drawn, f"Avg.ACC of each method, {title or 'best first'}: {spoken}")
        )
    note = (
        f"Filled dot: Avg.ACC, the {MEANING['avg_acc']}, as the mean of the seeds; a tick for each seed. Open dot: "
        f"New.ACC, the {MEANING['new_acc']}. The longer the line between them, the more was forgotten."
    )
    found: list[Block] = [Text(note), Plots(pictures, "pairs" if pictures[1:] else "fits")]
    found += [without(page.same, one.head, one.rows, one.words, one.caption) for one in study_tables(page.study.tables)]
    return Section("Results", found)


def _tasks(page: Page) -> Section:
    """The score on each task at the end, of every method: the last row of its score matrix."""
    tasks = list(dict.fromkeys(task for group in page.study.groups for task in group.tasks))
    rows, heat = [], []
    for group in page.study.groups:
        means = [group.mean(lambda run, task=task: at_end(run, task)).mean for task in tasks]
        average = group.mean(lambda run: run.metric("avg_acc")).mean
        rows.append([group.method, group.order, *map(points, means), points(average)])
        shades = [np.nan if value is None else value / 100 for value in means]
        heat.append([np.nan, np.nan, *shades, np.nan])
    caption = "Score on each task at the end, in percent: the mean of the seeds. The deeper the blue, the higher."
    table = without(page.same, ["method", "order", *tasks, "average"], rows, 2, caption)
    kept = [row[1:] if page.same else row for row in heat]
    return Section("Scores by task", [replace(table, heat=kept), _where("The whole score matrix of every method is")])


def _where(what: str) -> Text:
    return Text(f"{what} in analysis.md, beside this page.", "missing")


def _elsewhere(found: list[ResultTable]) -> list[Block]:
    """Where tables that the page leaves out are."""
    names = " and ".join(f'"{one.title}"' for one in found)
    return [_where(f"{names} {'are' if found[1:] else 'is'}")] if found else []


def _stages(page: Page) -> Section:
    groups, only = page.drawn
    if not groups:
        return Section("", [])
    pictures = {}
    for kind, of in (("accuracy", averages), ("forgetting", forgettings)):
        over = [means([of(run) for run in group.runs]) for group in groups]
        lines = np.array([[np.nan if cell.mean is None else cell.mean for cell in cells] for cells in over])
        low, high = np.nanmin(lines), np.nanmax(lines)
        limits = (low - 0.08 * (high - low) - 1, high + 0.08 * (high - low) + 1)
        pictures[kind] = []
        for number, group in enumerate(groups):
            beside = [place for place, other in enumerate(groups) if other.order == group.order]
            title = group.method if only else page.name(group.method, group.order)
            drawn = study_plots.over_stages(lines[beside], beside.index(number), title, limits)
            spoken = ", ".join("none" if np.isnan(v) else f"{v:.1f}" for v in lines[number])
            alt = f"{kind} of {page.name(group.method, group.order)} over stages 1 to {lines.shape[1]}: {spoken}"
            pictures[kind].append(Picture(f"{kind}_{number}.svg", drawn, alt))
    accuracy, forgetting, tasks = page.analysis.tables["stages"]
    note = f"Accuracy. {accuracy.definition}"
    note += " Grey: the other methods in the same order." if len(groups) > 1 else ""
    note += f" Drawn for the order {only}; the tables have the others." if only else ""
    found: list[Block] = [
        Text(note),
        Plots(pictures["accuracy"]),
        Text(f"Forgetting. {forgetting.definition}"),
        Plots(pictures["forgetting"]),
        *(Folded(f"{one.title} as a table", page.table(one)) for one in (accuracy, forgetting)),
        *_elsewhere([tasks]),
    ]
    return Section("Accuracy and forgetting over stages", found)


def _types(page: Page) -> Section:
    def show(found: list[ResultTable]) -> list[Block]:
        keys = dict(zip(("avg_hal", "avg_iuf", "avg_oth"), ERROR_TYPES, strict=True))
        columns = {error: found[0].head.index(TYPES[metric]) for metric, error in keys.items()}
        rows: list[Any] = list(found[0].rows)
        of_orders: dict[str, dict[str, dict[str, float]]] = {order: {} for order in page.orders}
        for row in rows:
            of_orders[row[1]][row[0]] = {error: row[i].mean for error, i in columns.items()}
        pictures = []
        for number, (order, of) in enumerate(of_orders.items(), 1):
            shares = dict(sorted(of.items(), key=lambda item: sum(item[1].values())))
            spoken = "; ".join(f"{name} {sum(parts.values()):.1f}" for name, parts in shares.items())
            title = "" if page.same else f"order {order}"
            alt = f"Forgetting by error type, {title or 'least first'}: {spoken}"
            pictures += [Picture(f"types_{number}.svg", study_plots.error_types(shares, title), alt)] if shares else []
        key = Key([(error.replace("_", " "), plots.ERROR_COLOURS[error]) for error in ERROR_TYPES])
        incomplete = [one.title for one in found if any(str(row[-1]).startswith("INCOMPLETE") for row in one.rows)]
        banners = [Text(f"Incomplete: {title}. Some errors are not judged yet.", "banner") for title in incomplete]
        note = Text(
            "How many points each type of error costs more at the end than when a task was learnt; dark mark: the sum."
        )
        return [note, key, Plots(pictures, "pairs" if pictures[1:] else "fits"), *banners, *map(page.table, found)]

    return page.section("types", "Forgetting by error type", show)


def _transfer(page: Page) -> Section:
    def show(found: list[ResultTable]) -> list[Block]:
        groups, only = page.drawn
        panels = []
        for group in groups:
            values = np.mean([changes(run)[1:, :-1] for run in group.runs], axis=0)
            title = group.method if only else page.name(group.method, group.order)
            panels.append(plots.Panel(title, values, group.tasks[1:], group.tasks[:-1]))
        limit = max(float(np.nanmax(abs(panel.values))) for panel in panels)
        pictures = [
            Picture(
                f"transfer_{number}.svg",
                plots.heat_maps([[panel]], limit, "+.0f"),
                f"Heat map of the changes of earlier tasks, {panel.title}: {_extremes(panel)}",
            )
            for number, panel in enumerate(panels, 1)
        ]
        note = (
            "How the score of an earlier task (column) changed while another task (row) was learnt, in points, as the "
            "mean of the seeds. Blue: it rose; vermilion: it fell."
        )
        note += f" Drawn for the order {only}." if only else ""
        return [page.table(found[0]), Text(note), Plots(pictures, "maps"), *_elsewhere(found[1:])]

    return page.section("transfer", "Transfer between tasks", show)


def _extremes(panel: plots.Panel) -> str:
    """The greatest fall and rise of a heat map in words."""
    spoken = []
    for name, place in (("lowest", np.nanargmin(panel.values)), ("highest", np.nanargmax(panel.values))):
        row, column = map(int, np.unravel_index(place, panel.values.shape))
        value = points(float(panel.values[row, column]), signed=True)
        spoken.append(f"{name} {value}, {panel.columns[column]} while learning {panel.rows[row]}")
    return "; ".join(spoken)


def _metrics() -> Section:
    names = [*METRICS, *BY_OUTPUT, *(name for name in TYPES if name not in METRICS), "forgetting_intermodal"]
    rows = [[METRICS.get(name, TYPES.get(name, name)), FORMULAS[name]] for name in names]
    note = "R[t][i] is the score in percent on task i after stage t of T, tasks in training order."
    return Section("Metrics", [Text(note), Table(["metric", "formula and divisor"], rows, words=(1,))])


def _reproduction(page: Page, command: str) -> Section:
    every = [(group, run) for group in page.study.groups for run in group.runs]
    rows = [[page.name(group.method, group.order), str(run.results.seed), str(run.path)] for group, run in every]
    runs = Folded("All runs", Table(["method", "seed", "folder"], rows, words=(2,)))
    return Section("Reproduction", [Text("This command writes the page again."), Code(command), runs])
