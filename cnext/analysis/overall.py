"""Orders, ablations, seeds and stages, from score matrices alone: Tables 4 to 6, Figures 8 and 9 of Continual-NExT."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from msgspec.structs import replace

from cnext.analysis.groups import Group, RunGroups, means
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.tables.aggregate import METRICS, Summary, summary, summary_with_range

ABLATION = ("moelora", "ew", "ew-ga", "mage-paper")
"""The paper's ablation: experts with a router, with equal weights, trained by modality, and averaged."""
ACCURACY = "After each stage, the mean score of the tasks learnt so far, in percent."
FORGETTING = "After each stage, the mean fall of the scores of the earlier tasks since each was learnt, in points."
BY_OUTPUT = {"avg_acc_text": "text", "avg_acc_image": "image"}


def orders(study: RunGroups) -> list[ResultTable]:
    """The metrics of every order, and their range over orders."""
    if len({group.order for group in study.groups}) < 2:
        raise Unavailable(f"orders needs runs of two or more orders; all are of {study.groups[0].order}")
    columns = {**BY_OUTPUT, **METRICS}
    rows = [[g.method, g.order, len(g.runs), *(_metric(g, name) for name in columns)] for g in study.groups]
    definition = (
        "Mean score at the end of the tasks that write text and of those that write images, then Avg.ACC, Forgetting "
        "and New.ACC over all tasks: mean ± sample standard deviation of n seeds."
    )
    found = [ResultTable("orders", "Orders", definition, ["method", "order", "n", *columns.values()], rows, words=2)]
    methods = {group.method: [g for g in study.groups if g.method == group.method] for group in study.groups}
    rows = [
        [method, len(of), *(_range([_metric(group, name).mean for group in of]) for name in columns)]
        for method, of in methods.items()
        if len(of) > 1
    ]
    if rows:
        definition = "Mean of the orders' means, and [minimum, maximum]."
        head = ["method", "orders", *columns.values()]
        found.append(ResultTable("orders.range", "Range over orders", definition, head, rows))
    return found


def ablations(study: RunGroups) -> list[ResultTable]:
    """The methods of the paper's ablation, and the difference of each from the one before, paired by seed."""
    groups = [group for name in ABLATION for group in study.groups if group.runs[0].method == name]
    if len({group.runs[0].method for group in groups}) < 2:
        raise Unavailable(f"the ablation needs two methods or more of {', '.join(ABLATION)}")
    groups.sort(key=lambda group: group.order)
    tasks = list(dict.fromkeys(task for group in groups for task in group.tasks))
    rows: list[list[Cell]] = [
        [
            group.method,
            group.order,
            *(group.mean(lambda run, task=task: at_end(run, task)) for task in tasks),
            *(_metric(group, name) for name in METRICS),
        ]
        for group in groups
    ]
    definition = "Score on each task at the end, in percent, then Avg.ACC, Forgetting and New.ACC."
    head = ["method", "order", *tasks, *METRICS.values()]
    found = [ResultTable("ablations", "Ablation", definition, head, rows, words=2)]
    steps = []
    for before, after in itertools.pairwise(groups):
        if before.order == after.order:
            cells = [_paired(before, after, name) for name in METRICS]
            steps.append([f"{before.method} → {after.method}", after.order, cells[0].n, *cells])
    definition = "Differences between consecutive methods of the ablation, second minus first, paired by seed."
    head = ["step", "order", "pairs", *METRICS.values()]
    return [*found, ResultTable("ablations.steps", "Steps of the ablation", definition, head, steps, 2, True)]


def seeds(study: RunGroups) -> list[ResultTable]:
    """Mean, standard deviation and range over seeds, and the metrics of every seed."""
    if all(len(group.runs) < 2 for group in study.groups):
        raise Unavailable("seeds needs two or more seeds of a method; every method has one")
    rows = [
        [group.method, group.order, len(group.runs), *(_spread(group, name) for name in METRICS)]
        for group in study.groups
    ]
    definition = "Mean ± sample standard deviation (divisor n - 1) over n seeds, and [minimum, maximum] seed."
    head = ["method", "order", "n", *METRICS.values()]
    each: list[list[Cell]] = [
        [group.method, group.order, str(run.results.seed), *(run.metric(name) for name in METRICS)]
        for group in study.groups
        for run in group.runs
    ]
    definition = "Avg.ACC, Forgetting and New.ACC of each run."
    return [
        ResultTable("seeds", "Seeds", definition, head, rows, words=2),
        ResultTable(
            "seeds.runs", "Every run", definition, ["method", "order", "seed", *METRICS.values()], each, words=3
        ),
    ]


def stages(study: RunGroups) -> list[ResultTable]:
    """Average accuracy, forgetting and every task's score over the stages."""
    groups = [group for group in study.groups if not group.runs[0].joint]
    if not groups:
        raise Unavailable("stages needs tasks that are learnt one after another; joint training has one stage")
    count = max(len(group.tasks) for group in groups)
    numbers = [str(stage) for stage in range(1, count + 1)]
    found = []
    for name, title, of, definition in (
        ("accuracy", "Accuracy over stages", averages, ACCURACY),
        ("forgetting", "Forgetting over stages", forgettings, FORGETTING),
    ):
        rows = [
            [g.method, g.order, *over_stages(g, of, count)] for g in groups if of is averages or not g.runs[0].untrained
        ]
        found.append(ResultTable(f"stages.{name}", title, definition, ["method", "order", *numbers], rows, words=2))
    rows = [
        [group.method, group.order, task, *over_stages(group, lambda run, i=i: run.scores[1:, i], count)]
        for group in groups
        for i, task in enumerate(group.tasks)
    ]
    definition = "Score on each task after each stage, in percent, from the stage that learns it on."
    return [
        *found,
        ResultTable(
            "stages.tasks", "Tasks over stages", definition, ["method", "order", "task", *numbers], rows, words=3
        ),
    ]


def averages(run: Run) -> list[float]:
    """a_t, the mean score on the tasks learnt by stage t, for every stage done."""
    return run.matrix.stage_averages()


def forgettings(run: Run) -> list[float]:
    """f_t, the mean drop since learnt of the tasks before stage t, for every stage done; NaN for the first."""
    return run.matrix.stage_forgetting()


def over_stages(group: Group, of: Callable[[Run], Iterable[float]], count: int) -> list[Cell]:
    """Mean over a group's runs of what ``of`` gives for each stage; nothing beyond the last."""
    found = means([list(of(run)) for run in group.runs])
    return [*found, *[None] * (count - len(found))]


def _metric(group: Group, name: str) -> Summary:
    return group.mean(lambda run: run.metric(name))


def at_end(run: Run, task: str) -> float | None:
    """The score on a task after the last stage."""
    value = run.scores[-1, run.tasks.index(task)] if task in run.tasks else np.nan
    return None if np.isnan(value) else float(value)


def _range(means: list[float | None]) -> Summary:
    known = [mean for mean in means if mean is not None]
    return summary_with_range(known, known)


def _spread(group: Group, name: str) -> Summary:
    known = [value for run in group.runs if (value := run.metric(name)) is not None]
    low, high = (min(known), max(known)) if len(known) > 1 else (None, None)
    return replace(summary(known), low=low, high=high)


def _paired(before: Group, after: Group, name: str) -> Summary:
    seeds = {run.results.seed: run.metric(name) for run in before.runs}
    pairs = [(seeds.get(run.results.seed), run.metric(name)) for run in after.runs]
    return summary([new - old for old, new in pairs if old is not None and new is not None])
