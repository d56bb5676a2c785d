"""Estimates of the averages, with 95% confidence intervals, from a judged sample of the errors."""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum, sqrt

from cnext.judging.cases import Case
from cnext.judging.cells import Cell, JudgedRun
from cnext.judging.statistics import wilson
from cnext.scoring.base import ERROR_TYPES

AVERAGES = dict(zip(("avg_hal", "avg_iuf", "avg_oth"), ERROR_TYPES, strict=True))
Interval = tuple[float, float, float]
"""An estimate, and the ends of its 95% interval."""


def estimates(run: JudgedRun, labels: Mapping[Case, str | None]) -> dict[str, dict[str, float]] | None:
    """Avg.HAL, Avg.IUF and Avg.OTH, estimated from a judged sample of every cell's errors.

    A cell's share of type c is E_c = R_c + S p_c: R_c the points lost by errors that rules classify as c, S those lost
    by errors that no rule decides, p_c the proportion of c in the points lost by the judged ones among these. The
    estimates add up to Forgetting.

    Returns:
        estimate, low and high by metric, in points; None where a cell has undecided errors and none was judged.

    Reference: Zou and Donner 2008, "Construction of confidence limits about effect measures", for sums.
    """
    last = run.matrix().stages_done
    cells = {(cell.stage, cell.task): cell for cell in run.decisive()}
    found = {}
    for name, kind in AVERAGES.items():
        terms: list[Interval] = []
        for number, task in enumerate(run.tasks[: last - 1], 1):
            end, learnt = (_share(cells[stage, task], kind, labels) for stage in (last, number))
            if end is None or learnt is None:
                return None
            terms += [end, (-learnt[0], -learnt[2], -learnt[1])]
        if not terms:
            return None
        estimate, low, high = _sum(terms)
        ends = {"estimate": estimate, "low": low, "high": high}
        found[name] = {end: value / (last - 1) for end, value in ends.items()}
    return found


def _sum(terms: list[Interval]) -> Interval:
    """The sum of independent estimates; distances to the interval's ends add up in squares."""
    total = fsum(estimate for estimate, _, _ in terms)
    below = sqrt(fsum((estimate - low) ** 2 for estimate, low, _ in terms))
    above = sqrt(fsum((high - estimate) ** 2 for estimate, _, high in terms))
    return total, total - below, total + above


def _share(cell: Cell, kind: str, labels: Mapping[Case, str | None]) -> Interval | None:
    """The share of one type in percent of a cell's samples; None where no undecided error was judged.

    The interval of p_c is Wilson's, for the effective sample size (Σ w)² / Σ w² of errors that lose w points each,
    times the finite population correction (N - 1) / (N - n) for n judged of N.
    """
    ruled = fsum(lost for case, lost in cell.errors.items() if case.decided and case.by_rule == kind)
    undecided = {case: lost for case, lost in cell.errors.items() if not case.decided}
    judged = {case: lost for case, lost in undecided.items() if labels.get(case)}
    if undecided and not judged:
        return None
    lost, seen = fsum(undecided.values()), fsum(judged.values())
    part = fsum(lost for case, lost in judged.items() if labels[case] == kind) / seen if judged else 0.0
    low = high = part
    if left := len(undecided) - len(judged):
        count = seen**2 / fsum(lost**2 for lost in judged.values()) * (len(undecided) - 1) / left
        low, high = wilson(part * count, count)
    estimate, low, high = ((ruled + lost * value) / cell.samples for value in (part, low, high))
    return estimate, low, high
