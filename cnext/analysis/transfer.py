"""Effect of training a task on the earlier ones, within and across output modalities; Table 3 of Continual-NExT."""

from __future__ import annotations

import itertools

import numpy as np

from cnext.analysis.groups import Group, RunGroups, means
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run, mean_seen

SINGLE = "transfer needs two stages or more, one task learnt after another"


def changes(run: Run) -> np.ndarray:
    """(T, T) float64 in points: D[t, i] = R[t][i] - R[t-1][i] for tasks i learnt before task t; NaN elsewhere."""
    found = np.full((len(run.tasks), len(run.tasks)), np.nan)
    for t, i, change in run.matrix.changes():
        found[t, i] = change
    return found


def flows(run: Run) -> dict[str, float]:
    """Mean change of an earlier task's score, by the output modalities of both tasks; NaN without pairs.

    Keys: "within" and "across" (an output modality in common, or none), "text > image" for each two modalities, and
    "regained" and "lost", the sums of all rises and of all falls.
    """
    found = changes(run)
    writes = [set(run.modalities("writes", task)) for task in run.tasks]
    shared = np.array([[bool(one & other) for other in writes] for one in writes])
    flow = {"within": mean_seen(found[shared]), "across": mean_seen(found[~shared])}
    for source, target in itertools.product(sorted(set().union(*writes), reverse=True), repeat=2):
        pairs = np.array([[source in one and target in other for other in writes] for one in writes])
        flow[f"{source} > {target}"] = mean_seen(found[pairs])
    seen = found[np.isfinite(found)]
    return flow | {"regained": float(seen[seen > 0].sum()), "lost": float(seen[seen < 0].sum())}


def transfer(study: RunGroups) -> list[ResultTable]:
    """Summary by modalities, then the matrices of changes and of recoveries."""
    groups = [group for group in study.groups if in_turn(group.runs[0])]
    if not groups:
        raise Unavailable(SINGLE)
    flow = [[flows(run) for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for of in flow for found in of for name in found))
    names = [name for name in names if any(np.isfinite(found[name]) for of in flow for found in of)]
    rows = [
        [group.method, group.order, *means([[found[name] for name in names] for found in of])]
        for group, of in zip(groups, flow, strict=True)
    ]
    definition = (
        "Mean change of an earlier task's score while another task is learnt, in points. Within: both tasks write "
        "text, or both write images; across: one writes text and the other images. text > image: of tasks that write "
        "images, while one that writes text is learnt; and so on. Regained and lost: the sums of all rises and of all "
        "falls."
    )
    head = ["method", "order", *names]
    moved = "Change of the task in the column while the task in the row was learnt, in points."
    back = "Rise of the task in the column while the task in the row was learnt, in points; 0 where it fell."
    return [
        ResultTable("transfer", "Transfer within and across modalities", definition, head, rows, 2, True),
        _matrix(groups, "transfer.changes", "Change of earlier tasks", moved, -np.inf),
        _matrix(groups, "transfer.recovery", "Recovery of earlier tasks", back, 0.0),
    ]


def in_turn(run: Run) -> bool:
    """Whether two tasks or more were learnt, one after another."""
    return not run.joint and not run.untrained and run.last > 1


def _matrix(groups: list[Group], name: str, title: str, definition: str, least: float) -> ResultTable:
    earlier = list(dict.fromkeys(task for group in groups for task in group.tasks[:-1]))
    rows: list[list[Cell]] = []
    for group in groups:
        found = [np.maximum(changes(run), least) for run in group.runs]
        for t, trained in enumerate(group.tasks[1 : group.runs[0].last], 1):
            cells: dict[str, Cell] = dict.fromkeys(earlier)
            cells |= dict(zip(group.tasks[:t], means([of[t, :t] for of in found]), strict=True))
            rows.append([group.method, group.order, trained, *cells.values()])
    return ResultTable(name, title, definition, ["method", "order", "learning", *earlier], rows, words=3, signed=True)
