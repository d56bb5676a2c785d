"""Report sections made from the analyses of one run: transfer between tasks, forgotten samples, adapter updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cnext.analysis import ANALYSES
from cnext.analysis.drift import TURNED, later
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.formats import shown
from cnext.analysis.groups import RunGroups
from cnext.analysis.run import Run
from cnext.analysis.transfer import changes, in_turn
from cnext.analysis.updates import Updates, has_branches, read
from cnext.report import plots
from cnext.report.blocks import Block, Folded, Key, Picture, Plots, Section, Table, Text
from cnext.report.plots import DEEPEST, MORE, Panel

LISTED = 40
"""Forgotten samples that the page lists for each task; `cnext analyze` lists all."""
NARROW = 16
"""Heat maps of at most so many columns are shown side by side."""


def table(result: ResultTable, without: Sequence[str] = ("method", "order")) -> Table:
    """The table of an analysis under its definition, without the columns that repeat one value; a name column stays."""
    kept = [column for column, name in enumerate(result.head) if name not in without]
    if kept[0] >= result.words:
        kept.insert(0, 0)
    words = tuple(place for place, column in enumerate(kept) if column < result.words)
    rows = [[shown(row[column], result) for column in kept] for row in result.rows]
    return Table([result.head[column] for column in kept], rows, result.definition, words)


def missing(why: Unavailable | str) -> Text:
    """The note in place of an analysis that the run folder has not the files for."""
    return Text(f"Not shown: {why}.", "missing")


def heat_map(name: str, panel: Panel, limit: float, values: str = "", alt: str = "") -> Picture:
    """A heat map as a picture. alt: its content in words; "": that the table below repeats it."""
    return Picture(
        name, plots.heat_maps([[panel]], limit, values), alt or f"Heat map: {panel.title}; see the table below"
    )


def transfer(run: Run) -> Section:
    """How learning one task changed the scores of the earlier ones."""
    if not in_turn(run):
        return Section("", [])
    summary, moved, back = ANALYSES["transfer"](RunGroups.of(run))
    values = changes(run)[1 : run.last, : run.last - 1]
    rows, columns = run.tasks[1 : run.last], run.tasks[: run.last - 1]
    pictures = [
        heat_map(f"{name}.svg", Panel(title, cells, rows, columns), float(np.nanmax(abs(values), initial=0)), "+.1f")
        for name, title, cells in (
            ("transfer", "change of an earlier task", values),
            ("recovery", "recovery of an earlier task", np.where(values < 0, 0.0, values)),
        )
    ]
    note = "Row: the task in training; column: an earlier task; in points of its score. Blue: rises; vermilion: falls."
    blocks: list[Block] = [
        table(summary),
        Text(note),
        Plots(pictures, "maps"),
        Folded("Change of earlier tasks as a table", table(moved)),
        Folded("Recovery of earlier tasks as a table", table(back)),
    ]
    return Section("Transfer between tasks", blocks)


def breaks(run: Run) -> Section:
    """Samples answered correctly when learnt and not at the end: their error types, and how many differ in format."""
    title = "Forgotten samples"
    if not in_turn(run):
        return Section("", [])
    try:
        _, by_task, prompts = ANALYSES["breaks"](RunGroups.of(run))
    except Unavailable as why:
        return Section(title, [missing(why)])
    listed = [row for task in run.tasks for row in [row for row in prompts.rows if row[0] == task][:LISTED]]
    summary = f"All {len(listed)} forgotten samples"
    if len(listed) < len(prompts.rows):
        summary = f"The first {LISTED} forgotten samples of each task, {len(listed)} of {len(prompts.rows)}"
    folded = [Folded(summary, table(replace(prompts, rows=listed)))] if listed else []
    return Section(title, [table(by_task), *folded])


def drift(run: Run) -> Section:
    """The branches and layers that each task updated, and how similar the updates of two tasks are."""
    title = "Adapter updates"
    if not in_turn(run) or not has_branches(run):
        return Section("", [])
    try:
        found = read(run)
    except Unavailable as why:
        return Section(title, [missing(why)])
    shared, moved, cosines, distances, pairs, norms = ANALYSES["drift"](RunGroups.of(run))
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
    blocks: list[Block] = [
        table(shared),
        table(moved),
        Text(f"{norms.definition} Rows: layers; columns: projections."),
        _scale(deepest),
        Plots([Picture("drift.svg", plots.heat_maps(grid, deepest, sides=found.branches), alt)], "wide plot"),
        *_pairs(found, pairs),
        Text(TURNED),
        Plots(_cosines(found), "maps"),
        Folded("Cosines between updates of all branches as a table", table(cosines)),
        Folded("Distances between stages as a table", table(distances)),
        Folded("Distances between tasks, by layer and by projection, as a table", table(pairs)),
        Folded("Norms of all updates as a table", table(norms)),
    ]
    return Section(title, blocks)


def _scale(deepest: float) -> Key:
    """The values that the opacities of a heat map stand for."""
    return Key([(f"{share * deepest:.2f}", f"{MORE}{round(255 * DEEPEST * share):02x}") for share in (0.1, 0.5, 1)])


def _cosines(found: Updates) -> list[Picture]:
    """A heat map of the cosines between the tasks' updates, of all branches together and of each."""
    of_all = {"all branches": found.cosines()}
    if len(found.branches) > 1:
        of_all |= {branch: found.cosines(found.of(branch)) for branch in found.branches}
    known = {name: later(values)[:-1, 1:] for name, values in of_all.items()}
    known = {name: values for name, values in known.items() if np.isfinite(values).any()}
    limit = max((float(np.nanmax(abs(values))) for values in known.values()), default=0.0)
    pictures = []
    for number, (name, values) in enumerate(known.items(), 1):
        listed = ", ".join(
            f"{found.tasks[s]} and {found.tasks[t + 1]} {values[s, t]:.2f}" for s, t in np.argwhere(np.isfinite(values))
        )
        panel, alt = Panel(name, values, found.tasks[:-1], found.tasks[1:]), f"Cosines of updates of {name}: {listed}"
        pictures.append(heat_map(f"cosines_{number}.svg", panel, limit, "+.2f", alt))
    return pictures


def _pairs(found: Updates, pairs: ResultTable) -> list[Block]:
    """How far the adapters after one task are from those after a later one, a heat map a branch."""
    if not pairs.rows:
        return []
    columns = [*map(str, found.layers), "", *map(_short, found.projections)]
    rows: dict[str, dict[str, list[Cell]]] = {}
    for branch, first, second, *norms in pairs.rows:
        norms.insert(len(found.layers), None)
        rows.setdefault(str(branch), {})[f"{first} → {second}"] = norms
    panels = [Panel(branch, np.array([*of.values()], float), [*of], columns) for branch, of in rows.items()]
    deepest = max(float(np.nanmax(panel.values)) for panel in panels)
    pictures = [heat_map(f"distances_{number}.svg", panel, deepest) for number, panel in enumerate(panels, 1)]
    note = f"{pairs.definition} Rows: the two tasks; columns: layers, then projections."
    return [Text(note), _scale(deepest), Plots(pictures, "maps" if len(columns) <= NARROW else "wide plot")]


def _short(projection: str) -> str:
    return projection.rpartition(".")[2].removesuffix("_proj")
