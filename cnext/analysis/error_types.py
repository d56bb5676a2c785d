"""What forgetting consists of: hallucination, instruction unfollowing and other, as in Table 2 of Continual-NExT."""

from __future__ import annotations

from math import isclose
from typing import Any

from cnext.analysis.finding import Finding, Unavailable
from cnext.analysis.groups import Study, means
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.errors import UserError
from cnext.runs.schemas import JudgeTable

TYPES = {"avg_iuf": "Avg.IUF", "avg_hal": "Avg.HAL", "avg_oth": "Avg.OTH", "forgetting": "Forgetting"}
WHO = ("judge", "model", "prompts", "prompts_sha256", "profile")
"""What makes two judges one."""
NAMED = 3
"""So many runs without verdicts are named, the others counted."""


def types(study: Study) -> list[Finding]:
    """The types of each method, as the scorers' rules have them and as each judge has them whose tables are there."""
    found = [_by_rules(study)]
    learning = filter(in_turn, study.runs)
    for name in dict.fromkeys(name for run in learning for name in run.judged if not repeats(run, name)):
        found.append(_by_judge(study, name))
    found = [finding for finding in found if finding.rows]
    if not found:
        raise Unavailable("the error types need two stages or more, learnt one after another")
    return found


def _by_rules(study: Study) -> Finding:
    rows = []
    for group in study.groups:
        cells = means([[run.metric(name) for name in TYPES] for run in group.runs])
        if cells[0]["n"]:
            rows.append([group.method, group.order, *cells])
    definition = (
        "Growth, from when a task was learnt to the end and as the mean over all but the last task, of the share of "
        "points lost to answers that break the instruction (IUF), that are well formed and wrong (HAL) and to others "
        "(OTH), in percent of all test samples; the three add up to Forgetting. Told apart by the scorers' rules."
    )
    return Finding("types", "Types of forgetting", definition, ["method", "order", *TYPES.values()], rows, words=2)


def repeats(run: Run, name: str) -> bool:
    """Whether a table of a run is of the rules and has the same averages as the scorers' own errors."""
    table = run.judged[name]
    figures = [(run.metric(metric), table.metrics.get(metric)) for metric in TYPES]
    return table.judge == "rules" and all(
        ours == theirs or (ours is not None and theirs is not None and isclose(ours, theirs, abs_tol=1e-6))
        for ours, theirs in figures
    )


def averages(table: JudgeTable) -> list[Any]:
    """A judge's averages in the order of ``TYPES``: where only a sample was judged, estimates with their intervals."""
    estimates = table.estimates or {}
    return [
        {"n": 1, "mean": of.estimate, "sd": None, "low": of.low, "high": of.high}
        if (of := estimates.get(name))
        else table.metrics.get(name)
        for name in TYPES
    ]


def _by_judge(study: Study, name: str) -> Finding:
    rows, missing, judges = [], [], {}
    for group in (group for group in study.groups if in_turn(group.runs[0])):
        judged = [run for run in group.runs if name in run.judged]
        missing += [str(run.path) for run in group.runs if run not in judged]
        for run in judged:
            table = run.judged[name]
            judges.setdefault(tuple(getattr(table, key) for key in WHO), (run, table))
        if len(judges) > 1:
            listed = "\n".join(f"  {run.path}: {table.name}" for run, table in judges.values())
            raise UserError(f"judge/{name}.json is not of one judge, one table cannot hold both:\n{listed}")
        if judged:
            left = sum(run.judged[name].unjudged for run in judged)
            cells = means([[run.judged[name].metrics.get(metric) for metric in TYPES] for run in judged])
            told = f"INCOMPLETE: {left} not judged" if left else "complete"
            if len(judged) == 1 and judged[0].judged[name].estimates:
                cells, told = averages(judged[0].judged[name]), f"{told}; estimates with 95% intervals"
            rows.append([group.method, group.order, *cells, told])
    [(_, table)] = judges.values()
    definition = f"As above, told apart by {table.name}; where errors are not judged, nothing is guessed for them."
    if missing:
        others = f" and {len(missing) - NAMED} other runs" if len(missing) > NAMED else ""
        definition += f" Without its verdicts: {', '.join(missing[:NAMED])}{others}."
    head = ["method", "order", *TYPES.values(), "verdicts"]
    return Finding(f"types.{name}", f"Types of forgetting, judged: {name}", definition, head, rows, words=2)
