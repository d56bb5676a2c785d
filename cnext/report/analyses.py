"""Report sections made from the analyses of one run: transfer between tasks, forgotten samples, adapter updates."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cnext.analysis import ANALYSES
from cnext.analysis.drift import later
from cnext.analysis.formats import shown
from cnext.analysis.groups import RunGroups
from cnext.analysis.result import ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.analysis.transfer import changes, in_turn
from cnext.analysis.updates import Updates, has_branches, read
from cnext.report import plots
from cnext.report.blocks import Block, Code, Folded, Key, Picture, Plots, Section, Table, Text
from cnext.report.plots import DEEPEST, MORE, Panel

LISTED = 40
"""Forgotten samples that the page lists for each task; `cnext analyze` lists all."""
SIZES = (
    "How large each task's update of each weight matrix is (Frobenius norm): a row of maps for each branch, a column "
    "for each task; in a map, a row for each layer and a column for each of its weight matrices."
)


def without(names: Sequence[str], head: list[str], rows: list[list[str]], words: int, caption: str) -> Table:
    """A table without some columns; the first of its ``words`` columns of text stays where all of them are left out."""
    kept = [column for column, name in enumerate(head) if name not in names]
    if kept[0] >= words:
        kept.insert(0, 0)
    text = tuple(place for place, column in enumerate(kept) if column < words)
    return Table([head[column] for column in kept], [[row[column] for column in kept] for row in rows], caption, text)


def table(result: ResultTable, names: Sequence[str] = ("method", "order")) -> Table:
    """The table of an analysis under its definition, without columns that have one value only."""
    rows = [[shown(value, result) for value in row] for row in result.rows]
    return without(names, result.head, rows, result.words, result.definition)


def missing(why: Unavailable | str) -> Text:
    """The note in place of an analysis whose files are missing."""
    return Text(f"Not shown: {why}.", "missing")


def heat_map(name: str, panel: Panel, limit: float, values: str, alt: str) -> Picture:
    """A heat map as a picture. alt: its content in words."""
    return Picture(name, plots.heat_maps([[panel]], limit, values), alt)


def transfer(run: Run) -> Section:
    """How learning one task changed the scores of the earlier ones."""
    if not in_turn(run):
        return Section("", [])
    summary, moved, _ = ANALYSES["transfer"](RunGroups.of(run))
    values = changes(run)[1 : run.last, : run.last - 1]
    panel = Panel("change of an earlier task", values, run.tasks[1 : run.last], run.tasks[: run.last - 1])
    alt = "Heat map of the change of each earlier task while another is learnt; the table below has the values"
    picture = heat_map("transfer.svg", panel, float(np.nanmax(abs(values), initial=0)), "+.1f", alt)
    note = (
        "How the score of an earlier task (column) changed while another task (row) was learnt, in points. Blue: it "
        "rose; vermilion: it fell."
    )
    folded = Folded("Change of earlier tasks as a table", table(moved))
    return Section("Transfer between tasks", [Text(note), Plots([picture], "maps"), folded, table(summary)])


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
    shared, moved, cosines, *_ = ANALYSES["drift"](RunGroups.of(run))
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
    drawn = plots.heat_maps(grid, deepest, sides=found.branches)
    blocks: list[Block] = [
        table(moved),
        Text(SIZES),
        _scale(deepest),
        Plots([Picture("drift.svg", drawn, _largest(found))], "wide plot"),
        Text("How similar the directions of two tasks' updates are: 1 the same, 0 unrelated, below 0 opposed."),
        Plots(_cosines(found), "maps"),
        Folded("Similarity of directions as a table", table(cosines)),
        table(shared),
        Text("The sizes of all updates, and the distances between stages, are printed by this command."),
        Code(shlex.join(["cnext", "analyze", str(run.path), "--what", "drift"])),
    ]
    return Section(title, blocks)


def _largest(found: Updates) -> str:
    """The heat maps of the updates' sizes in words: where each task's update is the largest."""
    fields = found.norms()
    spoken = []
    for column, task in enumerate(found.tasks):
        branch, layer, projection = np.unravel_index(np.nanargmax(fields[:, column]), fields[:, column].shape)
        place = f"{found.branches[branch]}, layer {found.layers[layer]}, {_short(found.projections[projection])}"
        spoken.append(f"{task}: {place}, {fields[branch, column, layer, projection]:.2f}")
    listed = "; ".join(spoken)
    return f"Heat maps of the size of every task's update, a row a branch and a column a task. Largest: {listed}"


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


def _short(projection: str) -> str:
    return projection.rpartition(".")[2].removesuffix("_proj")
