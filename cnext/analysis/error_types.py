"""Forgetting by error type: hallucination, instruction unfollowing and other; Table 2 of Continual-NExT."""

from __future__ import annotations

from math import isclose

from cnext.analysis.groups import RunGroups, means
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.errors import UserError
from cnext.runs.schemas import JudgeTable
from cnext.tables.aggregate import Summary

TYPES = {"avg_iuf": "Avg.IUF", "avg_hal": "Avg.HAL", "avg_oth": "Avg.OTH", "forgetting": "Forgetting"}
WHO = ("judge", "model", "prompts", "prompts_sha256", "profile")
"""Two tables that agree in these are by one judge."""
NAMED = 3
"""How many runs without verdicts are named; the others are counted."""


def types(study: RunGroups) -> list[ResultTable]:
    """Forgetting by error type of each method, by the scorers' rules and by each judge with tables in judge/."""
    found = [_by_rules(study)]
    learning = filter(in_turn, study.runs)
    for name in dict.fromkeys(name for run in learning for name in run.judged if not repeats(run, name)):
        found.append(_by_judge(study, name))
    found = [result for result in found if result.rows]
    if not found:
        raise Unavailable("the error types need two or more tasks learnt one after another")
    return found


def _by_rules(study: RunGroups) -> ResultTable:
    rows = []
    for group in study.groups:
        cells = means([[run.metric(name) for name in TYPES] for run in group.runs])
        if cells[0].n:
            rows.append([group.method, group.order, *cells])
    definition = (
        "How many points more each type of error costs at the end than when a task was learnt, as the mean over the "
        "tasks before the last: answers that do not have the form that was asked for (IUF, instruction unfollowing), "
        "that have it and say something wrong (HAL, hallucination), and others (OTH). The three add up to Forgetting. "
        "Fixed rules decide the type."
    )
    return ResultTable(
        "types", "Forgetting by error type", definition, ["method", "order", *TYPES.values()], rows, words=2
    )


def repeats(run: Run, name: str) -> bool:
    """Whether a table of a run is of the rules and has the same averages as the scorers' own errors."""
    table = run.judged[name]
    figures = [(run.metric(metric), table.metrics.get(metric)) for metric in TYPES]
    return table.judge == "rules" and all(
        ours == theirs or (ours is not None and theirs is not None and isclose(ours, theirs, abs_tol=1e-6))
        for ours, theirs in figures
    )


def averages(table: JudgeTable) -> list[Cell]:
    """A judge's averages in the order of ``TYPES``: where only a sample was judged, estimates with their intervals."""
    estimates = table.estimates or {}
    return [
        Summary(1, of.estimate, None, of.low, of.high) if (of := estimates.get(name)) else table.metrics.get(name)
        for name in TYPES
    ]


def _by_judge(study: RunGroups, name: str) -> ResultTable:
    rows, missing, judges = [], [], {}
    for group in (group for group in study.groups if in_turn(group.runs[0])):
        judged = [run for run in group.runs if name in run.judged]
        missing += [str(run.path) for run in group.runs if run not in judged]
        for run in judged:
            table = run.judged[name]
            judges.setdefault(tuple(getattr(table, key) for key in WHO), (run, table))
        if len(judges) > 1:
            listed = "\n".join(f"  {run.path}: {table.name}" for run, table in judges.values())
            raise UserError(f"judge/{name}.json is by different judges, which one table cannot show:\n{listed}")
        if judged:
            left = sum(run.judged[name].unjudged for run in judged)
            cells = means([[run.judged[name].metrics.get(metric) for metric in TYPES] for run in judged])
            verdicts = f"INCOMPLETE: {left} not judged" if left else "complete"
            if len(judged) == 1 and judged[0].judged[name].estimates:
                cells, verdicts = averages(judged[0].judged[name]), f"{verdicts}; estimates with 95% intervals"
            rows.append([group.method, group.order, *cells, verdicts])
    [(_, table)] = judges.values()
    definition = f"As above, classified by {table.name}; errors that are not judged count for no type."
    if missing:
        others = f" and {len(missing) - NAMED} other runs" if len(missing) > NAMED else ""
        definition += f" Without its verdicts: {', '.join(missing[:NAMED])}{others}."
    head = ["method", "order", *TYPES.values(), "verdicts"]
    return ResultTable(f"types.{name}", f"Forgetting by error type, judge {name}", definition, head, rows, words=2)
