"""Benchmark validity: separability of the tasks, forward transfer, general ability kept, range over task orders."""

from __future__ import annotations

from collections.abc import Callable

from cnext.analysis.groups import Group, RunGroups
from cnext.analysis.result import Cell, ResultTable
from cnext.analysis.run import Run
from cnext.tables.aggregate import METRICS

UNMEASURED, INAPPLICABLE, FEW = "not measured", "not applicable", "needs three orders"
LEAST_ORDERS = 3
ROUTED = ("prototype", "mr-lora")
"""Methods with a branch for each task and a router: one without training, one trained on samples that are kept."""
SEEN = {"question": "the question", "image_and_question": "image and question"}
"""What a router sees, by its field of `Separability`."""


def validity(study: RunGroups) -> list[ResultTable]:
    """Separability of the tasks with its confusions, routers, forward transfer, general ability, range over orders."""
    return [*_separability(study), _routers(study), _transfer(study), *_general(study), _range(study)]


def _separability(study: RunGroups) -> list[ResultTable]:
    known = next((run.separability for run in study.runs if run.separability), None)
    rows: list[list[Cell]] = []
    confusions: list[list[Cell]] = []
    tasks = list(map(str, known.tasks)) if known else []
    for field, name in SEEN.items() if known else ():
        found = getattr(known, field)
        rows.append([name, sum(map(sum, found.confusion)), found.accuracy, 100 / len(found.confusion)])
        for task, counts in zip(tasks, found.confusion, strict=True):
            confusions.append([name, task, *counts])
    definition = (
        "Share of the samples whose task is that of the nearest centroid of the pretrained model's features, in "
        "percent. Chance: one task of all. Nothing is trained."
    )
    head = ["the router sees", "samples", "accuracy", "chance"]
    rows = rows or [[name, None, UNMEASURED, None] for name in SEEN.values()]
    found = [ResultTable("validity.separability", "Separability of the tasks", definition, head, rows)]
    if known:
        definition = "How many samples of the task in the row are assigned to the task in the column."
        head = ["the router sees", "task", *tasks]
        found.append(ResultTable("validity.confusion", "Tasks taken for others", definition, head, confusions, words=2))
    return found


def _routers(study: RunGroups) -> ResultTable:
    rows: list[list[Cell]] = [
        [group.method, group.order, *(_of(group, name) for name in METRICS)]
        for group in study.groups
        if group.runs[0].method in ROUTED
    ]
    definition = (
        "A branch for each task, and a router that chooses one for a question: prototype by the nearest centroid, "
        "without training; mr-lora by a branch trained on samples that are kept. Where the first comes as far as the "
        "second, the tasks are told apart without learning."
    )
    absent = [name for name in ROUTED if name not in {group.runs[0].method for group in study.groups}]
    rows += [[name, "", "not in this study", None, None] for name in absent]
    head = ["method", "order", *METRICS.values()]
    return ResultTable("validity.routers", "Routers over a branch for each task", definition, head, rows, words=2)


def _of(group: Group, name: str) -> Cell:
    return group.mean(lambda run: run.metric(name))


def _measured(group: Group, value: Callable[[Run], float | None], learns: bool) -> Cell:
    """The mean of a value over the runs of a group; words where it has none. learns: whether it is of learning."""
    if learns and (group.runs[0].joint or group.runs[0].untrained):
        return INAPPLICABLE
    found = group.mean(value)
    return found if found.n == len(group.runs) else UNMEASURED


def _transfer(study: RunGroups) -> ResultTable:
    rows: list[list[Cell]] = [
        [group.method, group.order, _measured(group, lambda run: run.metric("fwt"), True)] for group in study.groups
    ]
    definition = (
        "Mean over all tasks but the first of the score right before the task is learnt, minus its zero-shot score, in "
        "points: what the tasks before have taught for it."
    )
    head = ["method", "order", "forward transfer"]
    return ResultTable("validity.fwt", "Forward transfer", definition, head, rows, words=2, signed=True)


def _general(study: RunGroups) -> list[ResultTable]:
    sets = list(
        dict.fromkeys(
            name for run in study.runs for name in (run.results.held_out.tasks if run.results.held_out else ())
        )
    )
    count = max(len(group.tasks) for group in study.groups)
    ends: list[list[Cell]] = []
    rows: list[list[Cell]] = []
    for group in study.groups:
        for name in sets or [""]:
            cells = [
                _measured(group, lambda r, t=t, n=name: held_out(r, t, n), False) for t in range(len(group.tasks) + 1)
            ]
            joint = group.runs[0].joint
            cells = [INAPPLICABLE if joint and 0 < t < len(cells) - 1 else cell for t, cell in enumerate(cells)]
            change = _measured(group, lambda r, n=name: _change(r, n), False)
            ends.append([group.method, group.order, name, cells[0], cells[-1], change])
            rows.append([group.method, group.order, name, *cells, *[None] * (count + 1 - len(cells))])
    definition = (
        "Score on a held-out set, which no task trains, before training and at the end, and the change, in percent and "
        "points."
    )
    head = ["method", "order", "held-out set", "zero-shot", "at the end", "change"]
    found = [ResultTable("validity.general", "General ability kept", definition, head, ends, words=3)]
    if sets:
        definition = "Score on a held-out set after each stage, in percent; stage 0 is zero-shot."
        head = ["method", "order", "held-out set", *map(str, range(count + 1))]
        found.append(
            ResultTable("validity.general.stages", "General ability over stages", definition, head, rows, words=3)
        )
    return found


def held_out(run: Run, stage: int, name: str) -> float | None:
    """The score on a held-out set after a stage; None where it was not measured."""
    found = run.results.held_out
    if found is None or name not in found.tasks or stage >= len(found.scores):
        return None
    return dict(zip(map(str, found.tasks), found.scores[stage] or [], strict=False)).get(name)


def _change(run: Run, name: str) -> float | None:
    before, after = held_out(run, 0, name), held_out(run, len(run.tasks), name)
    return None if before is None or after is None else after - before


def _range(study: RunGroups) -> ResultTable:
    """The lowest and the highest of the orders' means, and in which order."""
    rows: list[list[Cell]] = []
    for method in dict.fromkeys(group.method for group in study.groups):
        groups = [group for group in study.groups if group.method == method]
        for name in ("avg_acc", "forgetting"):
            means = {group.order: mean for group in groups if (mean := _of_mean(group, name)) is not None}
            row: list[Cell] = [method, METRICS[name], len(groups)]
            if len(groups) < LEAST_ORDERS or not means:
                rows.append([*row, FEW if len(groups) < LEAST_ORDERS else INAPPLICABLE, "", None, ""])
                continue
            low, high = min(means, key=lambda order: means[order]), max(means, key=lambda order: means[order])
            rows.append([*row, means[low], low, means[high], high])
    definition = "The lowest and the highest of the orders' means, in percent and points, and which order it is."
    head = ["method", "metric", "orders", "lowest", "order of the lowest", "highest", "order of the highest"]
    return ResultTable("validity.orders", "Range over orders", definition, head, rows, words=2)


def _of_mean(group: Group, name: str) -> float | None:
    return group.mean(lambda run: run.metric(name)).mean
