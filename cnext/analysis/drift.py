"""Drift of the adapters: what tasks share in parameters, which branches each moved, where, and which way."""

from __future__ import annotations

import itertools

import numpy as np

from cnext.analysis.finding import Cell, Finding, Unavailable
from cnext.analysis.groups import Study, means
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.analysis.updates import Updates, has_branches, read, relations

SHARED = (
    "Over the pairs of tasks with the same or another set of input and output modalities: percent that their updates "
    "share, Σ min(p_s, p_t), p_t the share of a branch (or of a branch in one layer's projection) in the squared norm "
    "of task t's update U_t = B_t A_t - B_{t-1} A_{t-1}, and the cosine of the two updates; over all layers and halves "
    "of them, of the adapters as checkpoints keep them."
)
MOVED = "Share of each branch in the squared norm of each task's update, in percent."
TURNED = "Cosine between the updates of the tasks in row and column: 1 the same way, 0 unrelated, below 0 turned back."
PAIRS = (
    "Frobenius norm of the difference of one branch between the stages of two tasks, over all projections of a layer "
    "and over all layers of a projection, without the method's scale."
)
APART = "Frobenius norm of the difference of all branches between two stages, without the method's scale."
NORMS = "Frobenius norm of each task's update in one branch of one layer's projection, without the method's scale."


def drift(study: Study) -> list[Finding]:
    """What tasks of the same input or output share, which branches each task moved and which way; of one run, where."""
    learning = [group for group in study.groups if in_turn(group.runs[0])]
    groups = [group for group in learning if has_branches(group.runs[0])]
    if not groups:
        raise Unavailable(
            "drift needs two stages or more, one task learnt after another, and low-rank branches to follow"
        )
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
    definition = f"{SHARED} Left out, for want of low-rank branches: {without}." if without else SHARED
    tasks = found[0].tasks
    if any(group.tasks != groups[0].tasks for group in groups):
        tasks = [f"task {number}" for number in range(1, len(tasks) + 1)]
    keys = ["method", "order"]
    head = [*keys, "tasks have", "pairs", *measures[0]]
    findings = [
        Finding("drift", "What tasks share in parameters", definition, head, shared, words=3),
        Finding("drift.branches", "Which branches a task moved", MOVED, [*keys, "branch", *tasks], moved, words=3),
        Finding("drift.cosines", "Which way tasks moved", TURNED, [*keys, "task", *tasks[1:]], turned, 3, True),
    ]
    return [*findings, *places(study.single, found[0])] if study.single else findings


def later(values: np.ndarray) -> np.ndarray:
    """(T, T) values with NaN but above the diagonal."""
    return np.where(np.triu(np.ones_like(values), 1) > 0, values, np.nan)


def places(run: Run, found: Updates) -> list[Finding]:
    """How far every two stages of one run are apart, in all and by place, and the norm of every adapter's update."""
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
            *(found.apart(s + 1, t + 1, found.of(branch, [layer])) for layer in found.layers),
            *(found.apart(s + 1, t + 1, found.of(branch, projection=name)) for name in found.projections),
        ]
        for branch in found.branches
        for s, t in itertools.combinations(range(len(found.tasks)), 2)
    ]
    return [
        Finding("drift.distances", "How far the stages are apart", APART, ["from stage", *stages[1:]], apart[:-1]),
        Finding("drift.pairs", "How far tasks are apart", PAIRS, [*head, *layers, *found.projections], pairs, words=3),
        Finding("drift.norms", "Where a task moved", NORMS, ["branch", "layer", "projection", *found.tasks], norms, 3),
    ]
