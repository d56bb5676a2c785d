"""Report sections of a study: its methods compared over seeds and orders (study.html)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnext.analysis import Analysis
from cnext.analysis.error_types import TYPES
from cnext.analysis.groups import RunGroups, means
from cnext.analysis.overall import BY_OUTPUT, averages, forgettings
from cnext.analysis.result import ResultTable
from cnext.analysis.transfer import changes, in_turn
from cnext.report import plots, study_plots, validity
from cnext.report.analyses import heat_map, missing, table, without
from cnext.report.blocks import Block, Code, Folded, Key, Picture, Plots, Section, Table, Text
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS
from cnext.tables.aggregate import METRICS
from cnext.tables.formats import blocks as study_tables


def sections(study: RunGroups, analysis: Analysis, command: str) -> list[Section]:
    """All sections that the runs have files for; a section without its files says which. command: writes it again."""
    page, done = Page(study, analysis), analysis.tables
    found = [
        *(_head(page), _overview(page), _stages(page), _types(page), _transfer(page)),
        page.section("breaks", "Forgotten samples", page.first),
        *([] if page.same else [page.section("orders", "Orders")]),
        *([page.section("ablations", "Ablation")] if "ablations" in done else []),
        *([page.section("seeds", "Seeds", page.first)] if "seeds" in done else []),
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
        """The first table shown, the others folded."""
        return [self.table(found[0]), *(Folded(one.title, self.table(one)) for one in found[1:])]

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
    return Section(f"{f'{len(methods)} methods' if methods[1:] else methods[0]} on {setting['suite']}", blocks)


def _overview(page: Page) -> Section:
    rows = {}
    for group in page.study.groups:
        seeds = [value for run in group.runs if (value := run.metric("avg_acc")) is not None]
        if seeds:
            rows[page.name(group.method, group.order)] = (seeds, group.mean(lambda run: run.metric("new_acc")).mean)
    rows = dict(sorted(rows.items(), key=lambda row: -np.mean(row[1][0])))
    spoken = "; ".join(f"{name} {np.mean(seeds):.1f}" for name, (seeds, _) in rows.items())
    picture = Picture("avg_acc.svg", study_plots.accuracy(rows), f"Avg.ACC of each method, best first: {spoken}")
    note = (
        "Avg.ACC, the mean score over all tasks after the last stage, in percent: a tick for each seed, a dot for "
        "their mean. Open dot: New.ACC, the mean score of each task right after it was learnt. Forgetting is T/(T-1) "
        "times the distance between the dots."
    )
    found: list[Block] = [Text(note), Plots([picture], "fits")]
    found += [without(page.same, one.head, one.rows, one.words, one.caption) for one in study_tables(page.study.tables)]
    return Section("Results", found)


def _stages(page: Page) -> Section:
    groups = [group for group in page.study.groups if in_turn(group.runs[0])]
    if not groups:
        return Section("", [])
    pictures = {}
    for kind, of in (("accuracy", averages), ("forgetting", forgettings)):
        over = [means([of(run) for run in group.runs]) for group in groups]
        lines = np.array([[np.nan if cell.mean is None else cell.mean for cell in cells] for cells in over])
        low, high = np.nanmin(lines), np.nanmax(lines)
        limits = (low - 0.08 * (high - low) - 1, high + 0.08 * (high - low) + 1)
        pictures[kind] = [
            Picture(
                f"{kind}_{number}.svg",
                study_plots.over_stages(lines, number, page.name(group.method, group.order), limits),
                f"{kind} of {page.name(group.method, group.order)} over stages 1 to {lines.shape[1]}: "
                + ", ".join("none" if np.isnan(v) else f"{v:.1f}" for v in lines[number]),
            )
            for number, group in enumerate(groups)
        ]
    accuracy, forgetting, tasks = page.analysis.tables["stages"]
    found: list[Block] = [
        Text(f"{accuracy.definition}{' Grey: the other methods.' if len(groups) > 1 else ''}"),
        Plots(pictures["accuracy"]),
        Text(forgetting.definition),
        Plots(pictures["forgetting"]),
        *(Folded(f"{one.title} as a table", page.table(one)) for one in (accuracy, forgetting, tasks)),
    ]
    return Section("Accuracy and forgetting over stages", found)


def _types(page: Page) -> Section:
    def show(found: list[ResultTable]) -> list[Block]:
        keys = dict(zip(("avg_hal", "avg_iuf", "avg_oth"), ERROR_TYPES, strict=True))
        columns = {error: found[0].head.index(TYPES[metric]) for metric, error in keys.items()}
        rows: list[Any] = list(found[0].rows)
        shares = {page.name(*row[:2]): {error: row[i].mean for error, i in columns.items()} for row in rows}
        shares = dict(sorted(shares.items(), key=lambda item: sum(item[1].values())))
        spoken = "; ".join(f"{name} {sum(parts.values()):.1f}" for name, parts in shares.items())
        alt = f"Forgetting by error type, least first: {spoken}"
        picture = Picture("types.svg", study_plots.error_types(shares), alt)
        key = Key([(error.replace("_", " "), plots.ERROR_COLOURS[error]) for error in ERROR_TYPES])
        incomplete = [one.title for one in found if any(str(row[-1]).startswith("INCOMPLETE") for row in one.rows)]
        banners = [Text(f"Incomplete: {title}. Some errors are not judged yet.", "banner") for title in incomplete]
        note = Text("Forgetting in points, by the error type that became more frequent; dark bar: their sum.")
        return [note, key, Plots([picture], "fits"), *banners, *map(page.table, found)]

    return page.section("types", "Forgetting by error type", show)


def _transfer(page: Page) -> Section:
    def show(found: list[ResultTable]) -> list[Block]:
        panels = []
        for group in (group for group in page.study.groups if in_turn(group.runs[0])):
            values = np.mean([changes(run)[1:, :-1] for run in group.runs], axis=0)
            panels.append(plots.Panel(page.name(group.method, group.order), values, group.tasks[1:], group.tasks[:-1]))
        limit = max(float(np.nanmax(abs(panel.values))) for panel in panels)
        pictures = [heat_map(f"transfer_{number}.svg", one, limit, "+.0f") for number, one in enumerate(panels, 1)]
        note = "Mean change of an earlier task (column) while another is learnt (row), in points. Blue: rise."
        folded = [Folded(f"{one.title} as a table", page.table(one)) for one in found[1:]]
        return [page.table(found[0]), Text(note), Plots(pictures, "maps"), *folded]

    return page.section("transfer", "Transfer between tasks", show)


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
