"""One table of chosen columns, as a paper prints it: metrics, the scores of each task and a paired test, best in bold.

Needs neither torch nor numpy. ``COLUMNS`` declares every column: a metric of `scoring.matrix` is one line of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isclose
from typing import Any

from cnext.errors import UserError
from cnext.scoring.matrix import FORMULAS
from cnext.scoring.matrix_file import ScoreRecord, from_json
from cnext.tables import aggregate, formats
from cnext.tables.aggregate import FinishedRun, Groups, Summary

HIGHER, LOWER, NEITHER = 1, -1, 0
SAME = 1e-9
"""Means that are closer (in percent) are equal, and all are the best: float64 rounding."""
GROUPS = {"test": ("difference", "pairs", "above", "p", "p_holm")}
"""Names that stand for several columns."""


@dataclass(frozen=True)
class Column:
    """A column, or for a figure of each task one column a task.

    better: whether a higher or lower mean is the best, or neither.  title: above the column, or above its tasks.
    of_task: the figure of a task in a run, None where it has none.  meaning: for the documentation; "": a formula has
    it.
    """

    title: str
    better: int
    meaning: str = ""
    of_task: Callable[[Scores, int], float | None] | None = None


@dataclass(frozen=True)
class Scores:
    """A run with its score matrix."""

    run: FinishedRun

    @cached_property
    def record(self) -> ScoreRecord:
        results = self.run.results
        given = {key: getattr(results, key) for key in ("score_matrix", "zero_shot", "error_matrix", "writes")}
        # The released evaluators keep negative cosines.
        least = -100.0 if results.profile == "paper" else 0.0
        return from_json({"tasks": results.tasks, **given}, str(self.run.folder / "results.json"), least)

    @property
    def in_turn(self) -> bool:
        """Whether the tasks were learnt one after another, so that one can be new or forgotten."""
        return not self.run.untrained and self.run.results.joint is not True

    def metric(self, name: str) -> float | None:
        """A metric, computed where results.json is of a version without it."""
        if self.run.untrained and not name.startswith(("avg_acc", "worst_acc")):
            return None
        stored = self.run.results.metrics
        return stored[name] if name in stored else self.record.metrics().get(name)

    def of_task(self, column: Column, task: str) -> float | None:
        tasks = self.record.tasks
        return column.of_task(self, tasks.index(task)) if column.of_task and task in tasks else None

    def final(self, task: int) -> float | None:
        return self.record.matrix.to_rows()[-1][task]

    def learnt(self, task: int) -> float | None:
        return self.record.matrix.to_rows()[task][task] if self.in_turn else None

    def drop(self, task: int) -> float | None:
        learnt, final = self.learnt(task), self.final(task)
        last = task == len(self.record.tasks) - 1
        return None if last or learnt is None or final is None else learnt - final

    def zero_shot(self, task: int) -> float | None:
        return self.record.zero_shot[task] if self.record.zero_shot else None


COLUMNS: dict[str, Column] = {
    "avg_acc": Column("Avg.ACC", HIGHER),
    "new_acc": Column("New.ACC", HIGHER),
    "maa": Column("MAA", HIGHER),
    "forgetting": Column("Forgetting", LOWER),
    "forgetting_max": Column("Forgetting (max)", LOWER),
    "forgetting_peak": Column("Forgetting (peak)", LOWER),
    "bwt": Column("BWT", HIGHER),
    "fwt": Column("FWT", HIGHER),
    "transfer": Column("Transfer", HIGHER),
    "worst_acc": Column("Worst.ACC", HIGHER),
    "worst_forgetting": Column("Worst forgetting", LOWER),
    "recovery": Column("Recovery", NEITHER),
    "avg_acc_text": Column("Avg.ACC (text)", HIGHER),
    "avg_acc_image": Column("Avg.ACC (image)", HIGHER),
    "forgetting_text": Column("Forgetting (text)", LOWER),
    "forgetting_image": Column("Forgetting (image)", LOWER),
    "forgetting_intermodal": Column("Forgetting (inter-modal)", LOWER),
    "forgetting_intramodal": Column("Forgetting (intra-modal)", LOWER),
    "avg_hal": Column("Avg.HAL", LOWER),
    "avg_iuf": Column("Avg.IUF", LOWER),
    "avg_oth": Column("Avg.OTH", LOWER),
    "zero_shot_retention": Column(
        "General ability", HIGHER, "change of the mean score on held-out sets from zero-shot to the end, in points"
    ),
    "final": Column("at the end", HIGHER, "each task's score after the last stage", Scores.final),
    "learnt": Column("when learnt", HIGHER, "each task's score right after it was learnt", Scores.learnt),
    "drop": Column("drop", LOWER, "each task's score when learnt minus that at the end, but the last's", Scores.drop),
    "zero_shot": Column("zero-shot", NEITHER, "each task's score before training", Scores.zero_shot),
    "n": Column("n", NEITHER, "number of runs: of seeds, in the block over all orders of seeds and orders"),
    "difference": Column("difference", NEITHER, "Avg.ACC minus the baseline's, over pairs of one order and seed"),
    "pairs": Column("pairs", NEITHER, "number of these pairs"),
    "above": Column("higher in", NEITHER, "number of pairs in which the method is above the baseline"),
    "p": Column("p", NEITHER, "p-value of the exact two-sided sign test over the pairs"),
    "p_holm": Column("p (Holm)", NEITHER, "p corrected for the number of methods tested, by Holm's method"),
}
"""Every column by its name for --columns."""

METHOD, ORDER, ALL = "method", "order", "all orders"


@dataclass(frozen=True)
class Head:
    """A column as it stands in the table: of a task, or task "" for the others."""

    name: str
    task: str = ""

    @property
    def key(self) -> str:
        """Its name in CSV and JSON."""
        return f"{self.name}:{self.task}" if self.task else self.name

    @property
    def column(self) -> Column:
        return COLUMNS[self.name]


Value = Summary | int | float | None
Tests = dict[str, dict[str, Value]]
"""The columns of the group test by method."""


@dataclass(frozen=True)
class Row:
    """A method in an order, or over all of them. reference: no candidate for the best.  best: keys of columns."""

    method: str
    order: str
    n: int
    reference: str
    values: dict[str, Value]
    best: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chosen:
    """A table of chosen columns. rows: grouped by order.  notes: sentences for the caption."""

    setting: dict[str, Any]
    baseline: str
    heads: list[Head]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    @property
    def orders(self) -> list[str]:
        return list(dict.fromkeys(row.order for row in self.rows))


def expanded(names: Sequence[str]) -> list[str]:
    """Names of columns with those that a group stands for. Raises UserError for unknown ones, and repeated ones."""
    found: list[str] = []
    for name in names:
        if name not in COLUMNS | GROUPS:
            near = difflib.get_close_matches(name.lower().replace(".", "_").replace("-", "_"), [*COLUMNS, *GROUPS], 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown column {name!r}; {meant}valid: {', '.join([*COLUMNS, *GROUPS])}")
        for each in GROUPS.get(name, (name,)):
            if each in found:
                raise UserError(f"column {each} is named twice; name it once")
            found.append(each)
    return found


def choose(study: Groups, names: Sequence[str], missing: Sequence[str] = ()) -> Chosen:
    """The table of a study with these columns, in this order.

    Args: names: of ``COLUMNS`` and ``GROUPS``.  missing: names of runs that are not finished, for the caption.
    Raises: UserError for an unknown column, or a results.json without what one needs.
    """
    chosen = expanded(names)
    scores = {id(run): Scores(run) for run in study.runs}
    tasks = list(dict.fromkeys(task for run in study.runs for task in run.tasks))
    orders = list(dict.fromkeys(run.order for run in study.runs))
    blocks = {order: {m: [*of[order].values()] for m, of in study.cells.items() if order in of} for order in orders}
    if len(orders) > 1:
        # A mean over other orders would not be comparable.
        whole = {method: of for method, of in study.cells.items() if len(of) == len(orders)}
        blocks[ALL] = {method: [run for seeds in of.values() for run in seeds.values()] for method, of in whole.items()}
    counts = {len(runs) for order in orders for runs in blocks[order].values()}
    if len(counts) > 1 and "n" not in chosen:
        chosen.insert(0, "n")
    heads = [Head(name, task) for name in chosen for task in (tasks if COLUMNS[name].of_task else [""])]
    rows = []
    for order, methods in blocks.items():
        tests = _tests(methods, study.baseline) if {*chosen} & {*GROUPS["test"]} else {}
        block = [
            _row(method, order, [scores[id(run)] for run in runs], heads, tests) for method, runs in methods.items()
        ]
        rows += _with_best(block, heads)
    table = Chosen(study.setting, study.baseline, heads, rows)
    return replace(table, notes=_notes(table, study.notes, missing))


def _row(method: str, order: str, of: Sequence[Scores], heads: Sequence[Head], tests: Tests) -> Row:
    test = tests.get(method, {})
    # With the whole test, which the note needs.
    values = test | {head.key: _value(head, of, order == ALL, test) for head in heads}
    return Row(method, order, len(of), _reference(of), values)


def _reference(of: Sequence[Scores]) -> str:
    """Why a method is no candidate for the best; "" for one that learns in turn."""
    if all(each.in_turn for each in of):
        return ""
    return "no training" if any(each.run.untrained for each in of) else "joint training"


def _value(head: Head, of: Sequence[Scores], over_orders: bool, test: Mapping[str, Value]) -> Value:
    if head.name == "n":
        return len(of)
    if head.name in GROUPS["test"]:
        return test.get(head.name)

    def known(some: Sequence[Scores]) -> list[float]:
        task, name = head.task, head.name
        found = [each.of_task(head.column, task) if task else each.metric(name) for each in some]
        return [value for value in found if value is not None]

    if not over_orders:
        return aggregate.summary(known(of))
    orders = dict.fromkeys(each.run.order for each in of)
    means = [aggregate.summary(known([each for each in of if each.run.order == order])).mean for order in orders]
    return aggregate.summary_with_range(known(of), [mean for mean in means if mean is not None])


def _tests(methods: Mapping[str, Sequence[FinishedRun]], baseline: str) -> Tests:
    """The columns of the group test, of every method that learns in turn but the baseline."""
    of = {(run.order, run.seed): run.values["avg_acc"] for run in methods.get(baseline, ())}
    found: Tests = {}
    for method, runs in methods.items():
        if method == baseline or _reference([Scores(run) for run in runs]):
            continue
        pairs = [(run.values["avg_acc"], of.get((run.order, run.seed))) for run in runs]
        known = [here - there for here, there in pairs if here is not None and there is not None]
        above, p = aggregate.sign_test(known)
        found[method] = {"difference": aggregate.summary(known), "pairs": len(known), "above": above, "p": p}
    tested = {method: p for method, of in found.items() if isinstance(p := of["p"], float)}
    for method, p in zip(tested, holm(list(tested.values())), strict=True):
        found[method]["p_holm"] = p
    return found


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number: the chance of any false one among them is at most that shown.

    Reference: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Example:
        >>> holm([0.25, 0.01, 0.0625])
        [0.25, 0.03, 0.125]
    """
    found, greatest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        greatest = max(greatest, min(1.0, (len(ps) - rank) * ps[place]))
        found[place] = greatest
    return found


def _with_best(rows: Sequence[Row], heads: Sequence[Head]) -> list[Row]:
    """The rows of one order with the best of each column, decided on the means before rounding."""
    best: dict[int, set[str]] = {}
    for head in heads:
        means = {
            place: head.column.better * value.mean
            for place, row in enumerate(rows)
            if not row.reference and isinstance(value := row.values[head.key], Summary) and value.mean is not None
        }
        if head.column.better and len(means) > 1:
            top = max(means.values())
            for place in (place for place, mean in means.items() if isclose(mean, top, rel_tol=0, abs_tol=SAME)):
                best.setdefault(place, set()).add(head.key)
    return [replace(row, best=frozenset(best.get(place, ()))) for place, row in enumerate(rows)]


def _notes(table: Chosen, environments: Sequence[str], missing: Sequence[str]) -> list[str]:
    setting, rows, names = table.setting, table.rows, {head.name for head in table.heads}
    single = [row for row in rows if row.order != ALL]
    several, counts = len(table.orders) > 1, sorted({row.n for row in single})
    notes = [formats.setting_text(setting)]
    seeds = f"{counts[0]} seed{'s' * (counts[0] > 1)}" if len(counts) == 1 else "n seeds"
    notes.append(f"Mean ± sample standard deviation over {seeds}." if counts != [1] else "One seed.")
    if ALL in table.orders:
        notes.append("All orders: mean over orders and seeds [minimum, maximum of the orders' means].")
    elif several:
        notes.append("No method was run in all orders.")
    if any(row.best for row in rows):
        notes.append(f"Bold: the best mean{' of an order' if several else ''}, significant or not.")
        references = {row.method: row.reference for row in rows if row.reference}
        if references:
            listed = ", ".join(f"{method} ({why})" for method, why in references.items())
            notes.append(f"Not candidates for the best: {listed}.")
    if names & {*GROUPS["test"]}:
        notes.append(_test_note(table))
    fewer = [
        f"{row.method} {head.key} n = {value.n}"
        for row in rows
        for head in table.heads
        # Each order has another last task, which no drop has.
        if (head.name, row.order) != ("drop", ALL) and head.name != "difference"
        if isinstance(value := row.values[head.key], Summary) and 0 < value.n < row.n
    ]
    if fewer:
        notes.append(f"Over fewer runs, as the others have no value: {', '.join(fewer)}.")
    if missing:
        notes.append(f"Not finished and left out: {', '.join(missing)}.")
    return [*notes, *environments]


def _test_note(table: Chosen) -> str:
    tested = [(row.order, pairs) for row in table.rows if isinstance(pairs := row.values.get("pairs"), int) and pairs]
    orders, names = len(table.orders) > 1, {head.name for head in table.heads}
    base = f"{table.baseline} in Avg.ACC, paired by {'order and ' if orders else ''}seed"
    if not tested:
        return f"No method has a pair to be tested against {base}."
    if not names & {"p", "p_holm"}:
        return f"Difference to {base}."
    counts = sorted({pairs for _, pairs in tested})
    least = ", ".join(f"{2.0 ** (1 - n):.2g} with {n} pair{'s' * (n > 1)}" for n in counts)
    most = max(sum(order == other for other, _ in tested) for order in table.orders)
    number = f"the number of methods tested{' in an order' if orders else ''}, {most}"
    texts = {"p": f"p is not corrected for {number}", "p_holm": f"p (Holm) is corrected for {number}"}
    corrected = [text for name, text in texts.items() if name in names]
    return f"Exact two-sided sign test against {base} (p is at least {least}); {'; '.join(corrected)}."


def listing() -> list[tuple[str, str, str]]:
    """Name, title and meaning of every column and group, for the documentation."""
    rows = [(name, column.title, column.meaning or FORMULAS[name]) for name, column in COLUMNS.items()]
    return rows + [(name, "", f"the columns {', '.join(of)}") for name, of in GROUPS.items()]
