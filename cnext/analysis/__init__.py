"""Analyses of forgetting from run folders alone: one function each, `RunGroups` to `ResultTable`s.

Means over seeds and orders are in `tables`; how an analysis is drawn is in `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cnext.analysis.breaks import breaks
from cnext.analysis.drift import drift
from cnext.analysis.error_types import types
from cnext.analysis.groups import RunGroups
from cnext.analysis.overall import ablations, orders, seeds, stages
from cnext.analysis.result import ResultTable, Unavailable
from cnext.analysis.samples import samples
from cnext.analysis.transfer import transfer
from cnext.analysis.validity import validity
from cnext.errors import unknown

ANALYSES: dict[str, Callable[[RunGroups], list[ResultTable]]] = {
    "types": types,
    "transfer": transfer,
    "orders": orders,
    "ablations": ablations,
    "seeds": seeds,
    "stages": stages,
    "drift": drift,
    "samples": samples,
    "breaks": breaks,
    "validity": validity,
}


@dataclass(frozen=True)
class Analysis:
    """The tables by the name of the analysis, and why the others could not be made."""

    tables: dict[str, list[ResultTable]]
    left_out: dict[str, str]

    @property
    def results(self) -> list[ResultTable]:
        return [result for results in self.tables.values() for result in results]


def analyze(study: RunGroups, what: Sequence[str] = ()) -> Analysis:
    """The analyses named; without a name all that the folders allow, the others with what they lack.

    Raises: UserError for an unknown name, or where what was asked for by name cannot be made.
    """
    for name in what:
        if name not in ANALYSES:
            raise unknown("analysis", name, list(ANALYSES))
    tables, left_out = {}, {}
    for name in what or ANALYSES:
        try:
            tables[name] = ANALYSES[name](study)
        except Unavailable as why:
            if what:
                raise
            left_out[name] = str(why)
    return Analysis(tables, left_out)
