"""What the figures of a study stand on, and of one run what it did beside its tasks."""

from __future__ import annotations

from collections.abc import Callable

from cnext.analysis import ANALYSES
from cnext.analysis.groups import RunGroups
from cnext.analysis.result import ResultTable
from cnext.analysis.run import Run
from cnext.analysis.validity import FEW, INAPPLICABLE, UNMEASURED
from cnext.report import analyses
from cnext.report.blocks import Block, Folded, Section, Table, Text
from cnext.tables.aggregate import Summary

TITLE = "Benchmark validity"
NOTES = {
    "validity.separability": (
        "Can the tasks be told apart without learning? If so, a method that keeps a part for each task and looks up "
        "which one a question belongs to has next to nothing to forget, and its low forgetting says little."
    ),
    "validity.fwt": "Does learning one task help the next?",
    "validity.general": "Does the model keep what it could do before, where no task trains it?",
    "validity.orders": "How much depends on the order of the tasks?",
}
OF_A_RUN = ("validity.general.stages", "validity.fwt", "validity.separability")
FOLDED = ("validity.confusion", "validity.general.stages")


def beside_the_tasks(run: Run) -> Section:
    """The held-out set over the stages, forward transfer, and separability, as far as the run has them."""
    found = {one.name: one for one in ANALYSES["validity"](RunGroups.of(run))}
    tables = [found[name] for name in OF_A_RUN if name in found and not _lacking(found[name])]
    return Section("General ability and forward transfer", [analyses.table(one) for one in tables])


def blocks(found: list[ResultTable], table: Callable[[ResultTable], Table]) -> list[Block]:
    """The tables of the analysis "validity", each under what it asks, or a line where it has no figure.

    table: lays one out.
    """
    shown: list[Block] = []
    for one in found:
        shown += [Text(NOTES[one.name])] if one.name in NOTES else []
        if lacking := _lacking(one):
            shown.append(Text(f"{one.title}: {lacking}.", "missing"))
        else:
            shown.append(Folded(one.title, table(one)) if one.name in FOLDED else table(one))
    return shown


def _lacking(result: ResultTable) -> str:
    """What all rows say in place of figures, "" where one has a figure."""
    if any(isinstance(cell, float | Summary) for row in result.rows for cell in row):
        return ""
    words = [cell for row in result.rows for cell in row if cell in (FEW, UNMEASURED, INAPPLICABLE)]
    return ", or ".join(str(word) for word in dict.fromkeys(words))
