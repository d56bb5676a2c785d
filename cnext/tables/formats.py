"""Write tables as Markdown, CSV, LaTeX or JSON. Needs neither torch nor numpy."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from msgspec import UNSET, to_builtins

from cnext.tables.aggregate import (
    LEAST_PAIRS,
    METRICS,
    RESAMPLES,
    DifferenceRow,
    Differences,
    OrdersRow,
    SeedsRow,
    StudyTables,
    Summary,
)

NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"${character}$" for character in "<>|"},
    MINUS: "$-$",
    "±": r"$\pm$",
    NOTHING: "--",
    "Σ": r"$\Sigma$",
    "→": r"$\to$",
    "·": r"$\cdot$",
}


@dataclass(frozen=True)
class Table:
    """A caption, a head and rows of cells; the first ``words`` columns are text, the others numbers."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1


def mark(text: str) -> str:
    """Plain text escaped as one line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~$&!])", r"\\\1", " ".join(text.split()))


def _figure(value: float | None, sign: str = "", decimals: int = 2) -> str:
    if value is None:
        return NOTHING
    rounded = round(value, decimals) or 0.0
    return f"{rounded:{sign if rounded else ''}.{decimals}f}".replace("-", MINUS)


def cell(found: Summary, sign: str = "", decimals: int = 2) -> str:
    """mean ± sd [low, high], as far as known."""
    text = _figure(found.mean, sign, decimals)
    if found.sd is not None:
        text += f" ± {_figure(found.sd, decimals=decimals)}"
    if found.ends is not None:
        low, high = (_figure(end, sign, decimals) for end in found.ends)
        text += f" [{low}, {high}]"
    return text


def _cells(row: SeedsRow | OrdersRow | DifferenceRow, sign: str = "") -> list[str]:
    return [cell(getattr(row, metric), sign) for metric in METRICS]


def blocks(study: StudyTables) -> Iterator[Table]:
    """The tables of a study."""
    setting = study.setting
    where = f"Suite {setting['suite']}, backbone {setting['backbone']}, preset {setting['budget']}"
    caption = f"{where}, {setting['split']} items, {setting['profile']} scores in percent. "
    caption += "Mean ± sample standard deviation of n runs."
    if study.missing:
        caption += f" Not finished and left out: {', '.join(study.missing)}."
    caption += "".join(f" {note}" for note in study.notes or ())
    rows = [[row.method, row.order, str(row.n), *_cells(row)] for row in study.rows]
    yield Table(caption, ["method", "order", "n", *METRICS.values()], rows, words=2)
    if study.orders:
        caption = "Over the orders: mean of all runs, [minimum, maximum] of the orders' means."
        rows = [[row.method, str(len(row.orders)), str(row.n), *_cells(row)] for row in study.orders]
        yield Table(caption, ["method", "orders", "n", *METRICS.values()], rows)
    if study.differences:
        rows = [[row.method, str(row.n), *_cells(row, "+"), *_signs(row.avg_acc)] for row in study.differences]
        head = ["method", "pairs", *METRICS.values(), f"{METRICS['avg_acc']} higher in", "p"]
        yield Table(_difference_caption(study), head, rows)


def _signs(found: Differences) -> list[str]:
    shown = NOTHING if found.p is None else "<0.001" if found.p < 0.0005 else f"{found.p:.3f}"
    return [f"{found.above} of {found.n}" if found.n else NOTHING, shown]


def _difference_caption(study: StudyTables) -> str:
    caption = f"Difference to {study.baseline}, paired by order and seed: mean ± sample standard deviation of pairs"
    pairs = [row.n for row in study.differences]
    if max(pairs) >= LEAST_PAIRS:
        caption += (
            f" [95% interval: percentile bootstrap over the pairs, {RESAMPLES:,} resamples]. "
            "With few pairs it is coarse and too narrow: with three, as of three seeds, it is their range"
        )
    if min(pairs) < LEAST_PAIRS:
        caption += f". No interval with fewer than {LEAST_PAIRS} pairs"
    least = 2.0 ** (1 - max(pairs)) if max(pairs) else 1.0
    caption += f". p: exact two-sided sign test of Avg.ACC over the pairs; with {max(pairs)} it is at least {least:.2g}"
    return caption + "."


def markdown(study: StudyTables) -> str:
    """The study's tables as Markdown."""
    return as_markdown(blocks(study))


def as_markdown(tables: Iterable[Table]) -> str:
    """Padded tables: to be read as they are, or rendered."""
    parts = []
    for block in tables:
        widths = [max(3, *map(len, column)) for column in zip(block.head, *block.rows, strict=True)]
        rules = ["-" * width if i < block.words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = []
        for row in (block.head, rules, *block.rows):
            pairs = enumerate(zip(row, widths, strict=True))
            cells = [cell.ljust(width) if i < block.words else cell.rjust(width) for i, (cell, width) in pairs]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"{block.caption}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(study: StudyTables) -> str:
    """The study's tables as LaTeX."""
    return as_latex(blocks(study))


def as_latex(tables: Iterable[Table]) -> str:
    """A table environment for each; needs the package booktabs."""
    names = str.maketrans(LATEX)
    parts = ["% \\usepackage{booktabs}\n"]
    for block in tables:
        head, *rows = [" & ".join(cell.translate(names) for cell in row) + r" \\" for row in (block.head, *block.rows)]
        columns = "l" * block.words + "r" * (len(block.head) - block.words)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{block.caption.translate(names)}}}"]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        parts.append("\n".join([*lines, r"\end{tabular}", r"\end{table}"]) + "\n")
    return "\n".join(parts)


def comma_separated(study: StudyTables) -> str:
    """A line per table, method, order and metric. low, high: of the orders' means, or of the 95% interval.

    above, p: of differences, see `cnext.tables.aggregate.sign_test`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ["n", "mean", "sd", "low", "high", "above", "p"]
    writer.writerow(["table", "method", "order", "metric", *figures])
    for table in ("rows", "orders", "differences"):
        for row in getattr(study, table):
            for metric in METRICS:
                found = (getattr(getattr(row, metric), figure, UNSET) for figure in figures)
                values = [None if value is UNSET else value for value in found]
                writer.writerow([table, row.method, getattr(row, "order", ""), metric, *values])
    return text.getvalue()


def as_json(study: StudyTables) -> str:
    return json.dumps(to_builtins(study), indent=2, allow_nan=False) + "\n"


FORMATS = {"markdown": markdown, "csv": comma_separated, "latex": latex, "json": as_json}
SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex", "json": "json"}
