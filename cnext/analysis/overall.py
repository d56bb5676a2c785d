"""Orders, ablations, seeds and stages, from score matrices alone: Tables 4 to 6, Figures 8 and 9 of Continual-NExT."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from cnext.analysis.finding import Cell, Finding, Unavailable
from cnext.analysis.groups import Group, Study, means
from cnext.analysis.run import Run, mean_seen
from cnext.tables.aggregate import METRICS, summary

LADDER = ("moelora", "ew", "ew-ga", "mage")
"""The paper's ablation: experts with a router, with equal weights, trained by modality, and averaged."""
BY_OUTPUT = {"avg_acc_text": "text", "avg_acc_image": "image"}


def orders(study: Study) -> list[Finding]:
    """The figures of every order, and the range over orders."""
    if len({group.order for group in study.groups}) < 2:
        raise Unavailable(f"orders can be compared from two on; here is only {study.groups[0].order}")
    columns = {**BY_OUTPUT, **METRICS}
    rows = [[g.method, g.order, len(g.runs), *(_metric(g, name) for name in columns)] for g in study.groups]
    definition = (
        "Mean score at the end of the tasks that write text and of those that write images, then Avg.ACC, Forgetting "
        "and New.ACC over all tasks: mean ± sample standard deviation of n seeds."
    )
    found = [Finding("orders", "Orders", definition, ["method", "order", "n", *columns.values()], rows, words=2)]
    methods = {group.method: [g for g in study.groups if g.method == group.method] for group in study.groups}
    rows = [
        [method, len(of), *(_range([_metric(group, name)["mean"] for group in of]) for name in columns)]
        for method, of in methods.items()
        if len(of) > 1
    ]
    if rows:
        definition = "Mean of the orders' means, and [least, greatest] of them."
        head = ["method", "orders", *columns.values()]
        found.append(Finding("orders.range", "Range over orders", definition, head, rows))
    return found


def ablations(study: Study) -> list[Finding]:
    """The ladder of the paper's ablation, and each rung less the one before, paired by seed."""
    rungs = [group for name in LADDER for group in study.groups if group.runs[0].method == name]
    if len({group.runs[0].method for group in rungs}) < 2:
        raise Unavailable(f"the ablation needs two methods or more of {', '.join(LADDER)}")
    rungs.sort(key=lambda group: group.order)
    tasks = list(dict.fromkeys(task for group in rungs for task in group.tasks))
    rows: list[list[Cell]] = [
        [
            group.method,
            group.order,
            *(group.mean(lambda run, task=task: _at_end(run, task)) for task in tasks),
            *(_metric(group, name) for name in METRICS),
        ]
        for group in rungs
    ]
    definition = "Score on each task at the end, R[T][i], then Avg.ACC, Forgetting and New.ACC."
    head = ["method", "order", *tasks, *METRICS.values()]
    found = [Finding("ablations", "Ablation", definition, head, rows, words=2)]
    steps = []
    for before, after in itertools.pairwise(rungs):
        if before.order == after.order:
            cells = [_paired(before, after, name) for name in METRICS]
            steps.append([f"{before.method} → {after.method}", after.order, cells[0]["n"], *cells])
    definition = "What each step of the ablation changes: the row's second method less its first, paired by seed."
    head = ["step", "order", "pairs", *METRICS.values()]
    return [*found, Finding("ablations.steps", "Steps of the ablation", definition, head, steps, 2, True)]


def seeds(study: Study) -> list[Finding]:
    """Mean, deviation and range over seeds, and every seed's own figures."""
    if all(len(group.runs) < 2 for group in study.groups):
        raise Unavailable("seeds can be compared from two on; here every method has one")
    rows = [
        [group.method, group.order, len(group.runs), *(_spread(group, name) for name in METRICS)]
        for group in study.groups
    ]
    definition = "Mean ± sample standard deviation (divisor n - 1) over n seeds, and [least, greatest] seed."
    head = ["method", "order", "n", *METRICS.values()]
    each: list[list[Cell]] = [
        [group.method, group.order, str(run.results.seed), *(run.metric(name) for name in METRICS)]
        for group in study.groups
        for run in group.runs
    ]
    told = "Avg.ACC, Forgetting and New.ACC of each run."
    return [
        Finding("seeds", "Seeds", definition, head, rows, words=2),
        Finding("seeds.runs", "Every run", told, ["method", "order", "seed", *METRICS.values()], each, words=3),
    ]


def stages(study: Study) -> list[Finding]:
    """Average accuracy, forgetting and every task's score over the stages."""
    groups = [group for group in study.groups if not group.runs[0].joint]
    if not groups:
        raise Unavailable("joint training has one stage; there is nothing to follow over stages")
    count = max(len(group.tasks) for group in groups)
    numbers = [str(stage) for stage in range(1, count + 1)]
    found = []
    for name, title, of, definition in (
        ("accuracy", "Accuracy over stages", averages, "a_t = (1/t) Σ_{i<=t} R[t][i]"),
        ("forgetting", "Forgetting over stages", forgettings, "f_t = (1/(t-1)) Σ_{i<t} (R[i][i] - R[t][i])"),
    ):
        told = f"{title.split()[0]} of the tasks learnt so far after each stage t, {definition}."
        rows = [
            [g.method, g.order, *over_stages(g, of, count)] for g in groups if of is averages or not g.runs[0].untrained
        ]
        found.append(Finding(f"stages.{name}", title, told, ["method", "order", *numbers], rows, words=2))
    rows = [
        [group.method, group.order, task, *over_stages(group, lambda run, i=i: run.scores[1:, i], count)]
        for group in groups
        for i, task in enumerate(group.tasks)
    ]
    told = "Score on each task after each stage, R[t][i]; nothing before the stage that learns it."
    return [
        *found,
        Finding("stages.tasks", "Tasks over stages", told, ["method", "order", "task", *numbers], rows, words=3),
    ]


def averages(run: Run) -> np.ndarray:
    """(T,) a_t, the mean score on the tasks learnt by stage t; NaN where one is not evaluated."""
    return np.array([run.scores[t, :t].mean() for t in range(1, len(run.tasks) + 1)])


def forgettings(run: Run) -> np.ndarray:
    """(T,) f_t, the mean loss since learnt over the tasks before stage t; NaN for the first."""
    learnt = np.diag(run.scores[1:])
    return np.array([np.nan, *((learnt[: t - 1] - run.scores[t, : t - 1]).mean() for t in range(2, len(learnt) + 1))])


def over_stages(group: Group, of: Callable[[Run], np.ndarray], count: int) -> list[Cell]:
    """Mean over a group's runs of what ``of`` gives for each stage; nothing beyond the last."""
    found = means([of(run) for run in group.runs])
    return [*found, *[None] * (count - len(found))]


def _metric(group: Group, name: str) -> dict[str, Any]:
    return group.mean(lambda run: run.metric(name))


def _at_end(run: Run, task: str) -> float | None:
    value = mean_seen(run.scores[-1:, run.tasks.index(task)]) if task in run.tasks else np.nan
    return None if np.isnan(value) else value


def _range(means: list[float | None]) -> dict[str, Any]:
    known = [mean for mean in means if mean is not None]
    return {**summary(known), "sd": None, "low": min(known, default=None), "high": max(known, default=None)}


def _spread(group: Group, name: str) -> dict[str, Any]:
    known = [value for run in group.runs if (value := run.metric(name)) is not None]
    ends = {"low": min(known), "high": max(known)} if len(known) > 1 else {"low": None, "high": None}
    return summary(known) | ends


def _paired(before: Group, after: Group, name: str) -> dict[str, Any]:
    seeds = {run.results.seed: run.metric(name) for run in before.runs}
    pairs = [(seeds.get(run.results.seed), run.metric(name)) for run in after.runs]
    return summary([new - old for old, new in pairs if old is not None and new is not None])
