"""The report's analyses of one run: transfer between tasks, answers that broke, and drift of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cnext.analysis import ANALYSES
from cnext.analysis.drift import TURNED, later
from cnext.analysis.finding import Cell, Finding, Unavailable
from cnext.analysis.formats import shown
from cnext.analysis.groups import Study
from cnext.analysis.run import Run
from cnext.analysis.transfer import changes, in_turn
from cnext.analysis.updates import Updates, has_branches, read
from cnext.report.blocks import Block, Folded, Key, Picture, Plots, Section, Table, Text
from cnext.report.maps import DEEPEST, MORE, Panel, heat_maps

LISTED = 40
"""Broken answers that the page lists of each task; `cnext analyze` lists all."""
NARROW = 16
"""Heat maps of at most so many columns stand side by side."""


def table(finding: Finding, without: Sequence[str] = ("method", "order")) -> Table:
    """A finding as a table under its definition, without columns that say the same everywhere; one names the rows."""
    kept = [column for column, name in enumerate(finding.head) if name not in without]
    if kept[0] >= finding.words:
        kept.insert(0, 0)
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
        Plots([Picture("transfer.svg", drawn, alt)], "wide plot"),
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
    shared, moved, ways, apart, pairs, norms = ANALYSES["drift"](Study.of(run))
    fields = found.norms()
    deepest = float(np.nanmax(fields, initial=0))
    layers = [str(layer) for layer in found.layers]
    columns = [_short(name) for name in found.projections]
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
        spoken = ", ".join(
            f"{found.tasks[s]} and {found.tasks[t + 1]} {cosines[s, t]:.2f}"
            for s, t in np.argwhere(np.isfinite(cosines))
        )
        pictures.append(Picture(f"cosines_{number}.svg", drawn, f"Cosines between updates of {name}: {spoken}"))
    blocks: list[Block] = [
        table(shared),
        table(moved),
        Text(f"{norms.definition} Rows: layers; columns: projections."),
        _depths(deepest),
        Plots([where], "wide plot"),
        *_pairs(found, pairs),
        Text(TURNED),
        Plots(pictures, "maps"),
        Folded("The cosines of all branches as a table", table(ways)),
        Folded("How far the stages are apart", table(apart)),
        Folded("How far the tasks are apart, by layer and projection", table(pairs)),
        Folded("Every norm", table(norms)),
    ]
    return Section(title, blocks)


def _depths(deepest: float) -> Key:
    """What the depths of colour of a heat map stand for."""
    return Key([(f"{share * deepest:.2f}", f"{MORE}{round(255 * DEEPEST * share):02x}") for share in (0.1, 0.5, 1)])


def _pairs(found: Updates, pairs: Finding) -> list[Block]:
    """How far the adapters are apart after one task and after a later one, a heat map a branch."""
    if not pairs.rows:
        return []
    columns = [*map(str, found.layers), "", *map(_short, found.projections)]
    rows: dict[str, dict[str, list[Cell]]] = {}
    for branch, first, second, *norms in pairs.rows:
        norms.insert(len(found.layers), None)
        rows.setdefault(str(branch), {})[f"{first} → {second}"] = norms
    panels = [Panel(branch, np.array([*of.values()], float), [*of], columns) for branch, of in rows.items()]
    deepest = max(float(np.nanmax(panel.values)) for panel in panels)
    pictures = [
        Picture(
            f"apart_{number}.svg", heat_maps([[panel]], deepest), f"Heat map of {panel.title}, as in the table below"
        )
        for number, panel in enumerate(panels, 1)
    ]
    note = f"{pairs.definition} Rows: the two tasks; columns: layers, then projections."
    return [Text(note), _depths(deepest), Plots(pictures, "maps" if len(columns) <= NARROW else "wide plot")]


def _short(projection: str) -> str:
    return projection.rpartition(".")[2].removesuffix("_proj")
