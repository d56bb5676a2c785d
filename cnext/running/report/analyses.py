"""The report's analyses of one run: transfer between tasks, answers that broke, and drift of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnext.running.analysis import ANALYSES
from cnext.running.analysis.drift import TURNED, later
from cnext.running.analysis.finding import Finding, Unavailable
from cnext.running.analysis.formats import shown
from cnext.running.analysis.run import Run
from cnext.running.analysis.study import Study
from cnext.running.analysis.transfer import changes, in_turn
from cnext.running.analysis.updates import has_branches, read
from cnext.running.report.blocks import Block, Folded, Picture, Plots, Section, Table, Text
from cnext.running.report.maps import Panel, heat_maps

LISTED = 40
"""Broken answers that the page lists of each task; `cnext analyze` lists all."""


def table(finding: Finding, without: Sequence[str] = ("method", "order")) -> Table:
    """A finding as a table under its definition, without columns that say the same everywhere."""
    kept = [column for column, name in enumerate(finding.head) if name not in without]
    words = tuple(place for place, column in enumerate(kept) if column < finding.words)
    rows = [[shown(row[column], finding) for column in kept] for row in finding.rows]
    return Table([finding.head[column] for column in kept], rows, finding.definition, words)


def missing(why: Unavailable) -> Text:
    """What stands where an analysis cannot be made."""
    return Text(f"Not shown: {why}.", "missing")


def transfer(run: Run) -> Section:
    """What learning one task did to the earlier ones."""
    if not in_turn(run):
        return Section("", [])
    summary, moved, back = ANALYSES["transfer"](Study.of(run))
    values = changes(run)[1 : run.last, : run.last - 1]
    rows, columns = run.tasks[1 : run.last], run.tasks[: run.last - 1]
    panels = [
        Panel("change of an earlier task", values, rows, columns),
        Panel("of it regained", np.where(values < 0, 0.0, values), rows, columns),
    ]
    drawn = heat_maps([panels], float(np.nanmax(abs(values), initial=0)), "+.1f")
    alt = "Heat maps of the change and of the recovery of earlier tasks while a task is learnt, as in the tables below"
    note = "Row: the task being learnt; column: an earlier one; points of its score. Blue: rises; vermilion: falls."
    blocks: list[Block] = [
        table(summary),
        Text(note),
        Plots([Picture("transfer.svg", drawn, alt)], wide=True),
        Folded("Change of earlier tasks as a table", table(moved)),
        Folded("Recovery of earlier tasks as a table", table(back)),
    ]
    return Section("Transfer between tasks", blocks)


def breaks(run: Run) -> Section:
    """Which answers broke, how, and how much of it is format alone."""
    if not in_turn(run):
        return Section("", [])
    try:
        _, by_task, prompts = ANALYSES["breaks"](Study.of(run))
    except Unavailable as why:
        return Section("Answers that broke", [missing(why)])
    listed = [row for task in run.tasks for row in [row for row in prompts.rows if row[0] == task][:LISTED]]
    folded = table(Finding(prompts.name, prompts.title, prompts.definition, prompts.head, listed, prompts.words))
    told = f"Every prompt that broke ({len(listed)})"
    if len(listed) < len(prompts.rows):
        told = f"The first {LISTED} prompts of each task that broke, {len(listed)} of {len(prompts.rows)}"
    return Section("Answers that broke", [table(by_task), *([Folded(told, folded)] if listed else [])])


def drift(run: Run) -> Section:
    """Which branches each task moved, where and which way, and what tasks of the same modalities share."""
    title = "Drift of the adapters"
    if not in_turn(run) or not has_branches(run):
        return Section("", [])
    try:
        found = read(run)
    except Unavailable as why:
        return Section(title, [missing(why)])
    shared, moved, _, apart, norms = ANALYSES["drift"](Study.of(run))
    fields = found.norms()
    deepest = float(np.nanmax(fields, initial=0))
    layers = [str(layer) for layer in found.layers]
    columns = [name.rpartition(".")[2].removesuffix("_proj") for name in found.projections]
    grid = [
        [
            Panel("" if row else task, field, () if column else layers, () if row else columns)
            for column, (task, field) in enumerate(zip(found.tasks, of, strict=True))
        ]
        for row, of in enumerate(fields)
    ]
    alt = "Heat maps of the norm of every task's update, a row a branch and a column a task, as in the last table below"
    where = Picture("drift.svg", heat_maps(grid, deepest, sides=found.branches), alt)
    turned = [("all branches", found.cosines())]
    if len(found.branches) > 1:
        turned += [(branch, found.cosines(found.of(branch))) for branch in found.branches]
    turned = [(name, later(cosines)[:-1, 1:]) for name, cosines in turned]
    turned = [(name, cosines) for name, cosines in turned if np.isfinite(cosines).any()]
    limit = max((float(np.nanmax(abs(cosines))) for _, cosines in turned), default=0.0)
    pictures = []
    for number, (name, cosines) in enumerate(turned, 1):
        drawn = heat_maps([[Panel(name, cosines, found.tasks[:-1], found.tasks[1:])]], limit, "+.2f")
        pictures.append(Picture(f"cosines_{number}.svg", drawn, f"Heat map of the cosines between updates of {name}"))
    blocks: list[Block] = [
        table(shared),
        table(moved),
        Text(f"{norms.definition} Rows: layers; columns: projections; deepest: {deepest:.2f}."),
        Plots([where], wide=True),
        Text(TURNED),
        Plots(pictures),
        Folded("How far the stages are apart", table(apart)),
        Folded("Every norm", table(norms)),
    ]
    return Section(title, blocks)
