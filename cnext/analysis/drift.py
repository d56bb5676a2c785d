"""Drift of adapters: which branches and layers each task updates, and how similar the updates of tasks are."""

from __future__ import annotations

import itertools

import numpy as np

from cnext.analysis.groups import RunGroups, means
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.analysis.updates import Updates, has_branches, read, relations

SIMILARITY = (
    "How much the updates of two tasks overlap: the mean over the pairs of tasks whose inputs and outputs are of the "
    "same kinds or not. Shared: percent of the squared norms of the two updates that is in the same weight matrices of "
    "the same branches; branches shared: in the same branches, wherever in the model. Cosine: 1 the same direction, 0 "
    "unrelated, below 0 opposed. Shallow and deep half: of the layers. An update is the product of a branch's two "
    "matrices at the end of a task minus that before it."
)
BRANCHES = "How each task's update is divided among the branches, in percent of its squared norm."
TURNED = "Cosine between the updates of the tasks in row and column: 1 same direction, 0 unrelated, below 0 opposed."
PAIRS = (
    "Frobenius norm of the difference of one branch between the stages of two tasks, over all projections of a layer "
    "and over all layers of a projection, without the method's scale."
)
APART = "Frobenius norm of the difference of all branches between two stages, without the method's scale."
NORMS = "Frobenius norm of each task's update in one branch of one layer's projection, without the method's scale."


def drift(study: RunGroups) -> list[ResultTable]:
    """Similarity of updates by modality, norms by branch and cosines; for one run also by layer and projection."""
    learning = [group for group in study.groups if in_turn(group.runs[0])]
    groups = [group for group in learning if has_branches(group.runs[0])]
    if not groups:
        raise Unavailable("drift needs two or more tasks learnt one after another, and a method with low-rank branches")
    shared: list[list[Cell]] = []
    moved: list[list[Cell]] = []
    turned: list[list[Cell]] = []
    for group in groups:
        found = [read(run) for run in group.runs]
        related = [relations(*pair) for pair in zip(group.runs, found, strict=True)]
        for relation, first in related[0].items():
            measures = [{name: of[relation][name] for name in first if name != "pairs"} for of in related]
            cells = means([list(of.values()) for of in measures])
            shared.append([group.method, group.order, relation, int(first["pairs"]), *cells])
        for branch, *shares in zip(found[0].branches, *(100 * of.branch_shares() for of in found), strict=True):
            moved.append([group.method, group.order, branch, *means(shares)])
        for task, *cosines in zip(found[0].tasks, *(later(of.cosines()) for of in found), strict=True):
            turned.append([group.method, group.order, task, *means([row[1:] for row in cosines])])
        turned.pop()
    without = ", ".join(dict.fromkeys(group.method for group in learning if group not in groups))
    definition = f"{SIMILARITY} Left out, without low-rank branches: {without}." if without else SIMILARITY
    tasks = found[0].tasks
    if any(group.tasks != groups[0].tasks for group in groups):
        tasks = [f"task {number}" for number in range(1, len(tasks) + 1)]
    keys = ["method", "order"]
    head = [*keys, "tasks have", "pairs", *measures[0]]
    results = [
        ResultTable("drift", "Similarity of updates by modality", definition, head, shared, words=3),
        ResultTable("drift.branches", "Updates by branch", BRANCHES, [*keys, "branch", *tasks], moved, words=3),
        ResultTable("drift.cosines", "Cosines of updates", TURNED, [*keys, "task", *tasks[1:]], turned, 3, True),
    ]
    return [*results, *places(study.single, found[0])] if study.single else results


def later(values: np.ndarray) -> np.ndarray:
    """(T, T) values above the diagonal, NaN elsewhere."""
    return np.where(np.triu(np.ones_like(values), 1) > 0, values, np.nan)


def places(run: Run, found: Updates) -> list[ResultTable]:
    """Distances between the stages of one run, in total and by place, and the norm of every adapter's update."""
    stages = [run.stage(stage) for stage in range(len(found.tasks) + 1)]
    apart: list[list[Cell]] = [
        [stage, *(None if np.isnan(value) else float(value) for value in row[1:])]
        for stage, row in zip(stages, later(found.distances()), strict=True)
    ]
    norms: list[list[Cell]] = [
        [branch, str(layer), projection, *np.sqrt(energies).tolist()]
        for (layer, projection, branch), energies in zip(found.places, found.energies(), strict=True)
    ]
    head, layers = ["branch", "task", "and task"], [f"layer {layer}" for layer in found.layers]
    pairs: list[list[Cell]] = [
        [
            *(branch, found.tasks[s], found.tasks[t]),
            *(found.distance(s + 1, t + 1, found.of(branch, [layer])) for layer in found.layers),
            *(found.distance(s + 1, t + 1, found.of(branch, projection=name)) for name in found.projections),
        ]
        for branch in found.branches
        for s, t in itertools.combinations(range(len(found.tasks)), 2)
    ]
    columns = [*head, *layers, *found.projections]
    places = ["branch", "layer", "projection", *found.tasks]
    return [
        ResultTable("drift.distances", "Distances between stages", APART, ["from stage", *stages[1:]], apart[:-1]),
        ResultTable("drift.pairs", "Distances between tasks", PAIRS, columns, pairs, words=3),
        ResultTable("drift.norms", "Norms of updates", NORMS, places, norms, 3),
    ]
