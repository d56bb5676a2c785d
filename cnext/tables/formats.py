"""Write tables as Markdown, CSV, LaTeX, HTML or JSON. Needs neither torch nor numpy."""

from __future__ import annotations

import csv
import html as markup
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msgspec import UNSET, to_builtins

from cnext import durable
from cnext.errors import UserError
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

LONGEST = 200
"""Characters of a name in a table."""
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


SHRUNK = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
"""Begins a box that is as wide as its content, or as the page where that is wider."""


@dataclass(frozen=True)
class Table:
    """A caption, a head and rows of cells; the first ``words`` columns are text, the others numbers.

    over: titles above adjacent columns, with how many those are; "" for none.  bold: cells as (row, column).
    breaks: rows with a rule above.  narrow: LaTeX prints it small, to fit a page.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1
    over: Sequence[tuple[str, int]] = ()
    bold: frozenset[tuple[int, int]] = frozenset()
    breaks: frozenset[int] = frozenset()
    narrow: bool = False

    @property
    def full_head(self) -> list[str]:
        """The head in one line, with what stands over it."""
        over = [title for title, count in self.over for _ in range(count)] or [""] * len(self.head)
        return [f"{name} {title}".strip() for name, title in zip(self.head, over, strict=True)]


def short(text: str) -> str:
    """A name for a cell: what is longer than `LONGEST` is cut."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


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


def setting_text(setting: dict[str, Any]) -> str:
    """A sentence with what the runs of a table have in common."""
    where = f"Suite {setting['suite']}, backbone {setting['backbone']}, preset {setting['budget']}"
    return f"{where}, {setting['split']} items, {setting['profile']} scores in percent."


def blocks(study: StudyTables, escape: Callable[[str], str] = str) -> Iterator[Table]:
    """The tables of a study. escape: of names, which may be any text."""

    def say(text: object) -> str:
        return escape(short(str(text)))

    setting = {name: say(value) for name, value in study.setting.items()}
    caption = f"{setting_text(setting)} Mean ± sample standard deviation of n runs."
    if study.missing:
        caption += f" Not finished and left out: {', '.join(map(say, study.missing))}."
    caption += "".join(f" {escape(note)}" for note in study.notes or ())
    rows = [[say(row.method), say(row.order), str(row.n), *_cells(row)] for row in study.rows]
    yield Table(caption, ["method", "order", "n", *METRICS.values()], rows, words=2)
    if study.orders:
        caption = "Over the orders: mean of all runs, [minimum, maximum] of the orders' means."
        rows = [[say(row.method), str(len(row.orders)), str(row.n), *_cells(row)] for row in study.orders]
        yield Table(caption, ["method", "orders", "n", *METRICS.values()], rows)
    if study.differences:
        rows = [[say(row.method), str(row.n), *_cells(row, "+"), *_signs(row.avg_acc)] for row in study.differences]
        head = ["method", "pairs", *METRICS.values(), f"{METRICS['avg_acc']} higher in", "p"]
        yield Table(_difference_caption(study, say(study.baseline)), head, rows)


def p_value(p: float | None) -> str:
    return NOTHING if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"


def _signs(found: Differences) -> list[str]:
    return [f"{found.above} of {found.n}" if found.n else NOTHING, p_value(found.p)]


def _difference_caption(study: StudyTables, baseline: str) -> str:
    caption = f"Difference to {baseline}, paired by order and seed: mean ± sample standard deviation of pairs"
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
    return as_markdown(blocks(study, mark))


def marked(table: Table) -> Table:
    """The table with its words escaped as Markdown."""
    rows = [[*map(mark, row[: table.words]), *row[table.words :]] for row in table.rows]
    over = [(mark(title), count) for title, count in table.over]
    return replace(table, caption=mark(table.caption), head=[*map(mark, table.head)], rows=rows, over=over)


def as_markdown(tables: Iterable[Table]) -> str:
    """Padded tables: to be read as they are, or rendered."""
    parts = []
    for block in tables:
        body = [
            [f"**{cell}**" if (i, j) in block.bold else cell for j, cell in enumerate(row)]
            for i, row in enumerate(block.rows)
        ]
        head = block.full_head
        widths = [max(3, *map(len, column)) for column in zip(head, *body, strict=True)]
        rules = ["-" * width if i < block.words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = []
        for row in (head, rules, *body):
            pairs = enumerate(zip(row, widths, strict=True))
            cells = [cell.ljust(width) if i < block.words else cell.rjust(width) for i, (cell, width) in pairs]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"{block.caption}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(study: StudyTables) -> str:
    """The study's tables as LaTeX."""
    return as_latex(blocks(study))


def as_latex(tables: Iterable[Table]) -> str:
    """A table environment for each; needs the package booktabs, for narrow ones graphicx too."""
    tables = list(tables)
    parts = [f"% \\usepackage{{booktabs{',graphicx' * any(table.narrow for table in tables)}}}\n"]
    for block in tables:
        kind = "table*" if block.narrow else "table"
        columns = "l" * block.words + "r" * (len(block.head) - block.words)
        lines = [rf"\begin{{{kind}}}", r"\centering", rf"\caption{{{_tex(block.caption)}}}"]
        lines += [r"\footnotesize", r"\setlength{\tabcolsep}{3pt}", SHRUNK] if block.narrow else []
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [*_spanning(block), " & ".join(map(_tex, block.head)) + r" \\", r"\midrule"]
        for i, row in enumerate(block.rows):
            lines += [r"\midrule"] if i in block.breaks else []
            lines.append(" & ".join(_tex_cell(block, (i, j), cell) for j, cell in enumerate(row)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}" + "}" * block.narrow, rf"\end{{{kind}}}"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _tex(text: str) -> str:
    return " ".join(text.split()).translate(str.maketrans(LATEX))


def _tex_cell(table: Table, place: tuple[int, int], cell: str) -> str:
    shown = _tex(cell)
    if shown[:1] in ("[", "*") and not place[1]:
        shown = f"{{}}{shown}"  # or they would belong to the \\\\ before
    if place[1] < table.words or not table.narrow:
        return shown
    mean, spread, deviation = shown.partition(r" $\pm$ ")
    mean = rf"\textbf{{{mean}}}" if place in table.bold else mean
    return rf"{mean}{{\scriptsize$\pm${deviation}}}" if spread else mean


def _spanning(table: Table) -> list[str]:
    """The line of titles over adjacent columns, and the rules under them."""
    cells, rules, first = [], [], 1
    for title, count in table.over:
        cells.append(rf"\multicolumn{{{count}}}{{c}}{{{_tex(title)}}}")
        rules += [rf"\cmidrule(lr){{{first}-{first + count - 1}}}"] if title else []
        first += count
    return [" & ".join(cells) + r" \\", "".join(rules)] if table.over else []


def html(study: StudyTables) -> str:
    """The study's tables as a page."""
    return as_html(blocks(study))


STYLE = (
    "body{font:15px system-ui,sans-serif;margin:1.5rem}table{border-collapse:collapse;margin-bottom:2rem}"
    "caption{caption-side:bottom;text-align:left;max-width:60rem;padding-top:.5rem}"
    "th,td{padding:.2rem .6rem;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}"
    "th{font-weight:600}.w{text-align:left;font-weight:400}.o{text-align:center}"
    "table{border-top:2px solid;border-bottom:2px solid}.r>*,tbody tr:first-child>*{border-top:1px solid}"
)


def as_html(tables: Iterable[Table]) -> str:
    """One page without scripts; a table is copied from it into a document, or its element into another page."""
    lines = ["<!doctype html>", '<html lang="en">', '<meta charset="utf-8">', "<title>Tables of a study</title>"]
    lines += [f"<style>{STYLE}</style>"]
    for table in tables:
        lines += ["<table>", f"<caption>{markup.escape(table.caption)}</caption>", "<thead>"]
        if table.over:
            above = (
                f'<th class="o" colspan="{count}" scope="colgroup">{markup.escape(title)}</th>'
                if title
                else f'<td colspan="{count}"></td>'
                for title, count in table.over
            )
            lines.append(f"<tr>{''.join(above)}</tr>")
        cells = (f'<th{_words(table, i)} scope="col">{markup.escape(name)}</th>' for i, name in enumerate(table.head))
        lines += [f"<tr>{''.join(cells)}</tr>", "</thead>", "<tbody>"]
        for i, row in enumerate(table.rows):
            cells = (_html_cell(table, (i, j), cell) for j, cell in enumerate(row))
            rule = ' class="r"' if i in table.breaks else ""
            lines.append(f"<tr{rule}>{''.join(cells)}</tr>")
        lines += ["</tbody>", "</table>"]
    return "\n".join([*lines, "</html>"]) + "\n"


def _words(table: Table, column: int) -> str:
    return ' class="w"' if column < table.words else ""


def _html_cell(table: Table, place: tuple[int, int], cell: str) -> str:
    shown = markup.escape(cell)
    if place[1] < table.words:
        return f'<th class="w" scope="row">{shown}</th>'
    return f"<td>{f'<strong>{shown}</strong>' if place in table.bold else shown}</td>"


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
"""The files of a study."""
SUFFIXES = {"markdown": "md", "csv": "csv", "latex": "tex", "json": "json"}
WRITERS = FORMATS | {"html": html}
"""All that `cnext table` writes; study.html is the report."""
ENDINGS = {f".{suffix}": kind for kind, suffix in SUFFIXES.items()} | {".html": "html", ".markdown": "markdown"}


def kind_of(path: Path | None, kind: str | None) -> str:
    """The format of a table: the one asked for, else by the file's ending, else Markdown.

    Raises: UserError for a file with another ending, and for one whose ending is of another format than asked for.
    """
    if path is None:
        return kind or "markdown"
    by_ending = ENDINGS.get(path.suffix.lower())
    if kind is None and by_ending is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}; or name the --format")
    if kind and by_ending and kind != by_ending:
        raise UserError(f"{path} is by its ending of the format {by_ending}, not {kind}; leave out --format, or rename")
    return kind or by_ending or "markdown"


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, found a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(
            f"{path}: expected a folder {path.parent} to write it into, found none; make it, or name another"
        )
    durable.write(path, text.encode(errors="backslashreplace"))
