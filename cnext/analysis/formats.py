"""Analysis results as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

from msgspec import UNSET, to_builtins

from cnext.analysis import Analysis
from cnext.analysis.result import Cell, ResultTable
from cnext.tables.aggregate import Summary
from cnext.tables.formats import NOTHING, Table, as_latex, as_markdown, cell, mark

FIGURES = ("n", "mean", "sd", "low", "high")


def shown(value: Cell, result: ResultTable) -> str:
    """A cell as text."""
    if isinstance(value, str):
        return " ".join(value.split())
    if value is None or (isinstance(value, Summary) and not value.n):
        return NOTHING
    if isinstance(value, int):
        return str(value)
    found = value if isinstance(value, Summary) else Summary(1, value, None)
    return cell(found, "+" if result.signed else "", result.decimals)


def as_table(result: ResultTable) -> Table:
    """The result as text, with title and definition as the caption."""
    rows = [[shown(value, result) for value in row] for row in result.rows]
    return Table(f"{result.title}. {result.definition}", result.head, rows, result.words)


def markdown(analysis: Analysis) -> str:
    """Each table under its definition, then what was left out and why."""
    tables = [as_table(result) for result in analysis.results]
    marked = [
        replace(
            table,
            caption=mark(table.caption),
            head=[mark(name) for name in table.head],
            rows=[[mark(cell) for cell in row] for row in table.rows],
        )
        for table in tables
    ]
    left = "".join(f"- {mark(f'{name}: {why}')}\n" for name, why in analysis.left_out.items())
    return as_markdown(marked) + (f"\nLeft out:\n\n{left}" if left else "")


def latex(analysis: Analysis) -> str:
    return as_latex([as_table(result) for result in analysis.results])


def comma_separated(analysis: Analysis) -> str:
    """One block per table, each line begins with its name; beside a mean over runs are its n, sd, low and high."""
    blocks = []
    for result in analysis.results:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        figures = [_figures([row[i] for row in result.rows]) for i in range(len(result.head))]
        names = [
            [name if figure in ("", "mean") else f"{name} {figure}" for figure in found]
            for name, found in zip(result.head, figures, strict=True)
        ]
        writer.writerow(["table", *(name for found in names for name in found)])
        for row in result.rows:
            pairs = zip(row, figures, strict=True)
            writer.writerow([result.name, *(_raw(value, figure) for value, found in pairs for figure in found)])
        blocks.append(text.getvalue())
    return "\n".join(blocks)


def _figures(column: list[Cell]) -> list[str]:
    """The CSV columns of a column of means; [""] for any other."""
    known = {
        key
        for value in column
        if isinstance(value, Summary)
        for key in FIGURES
        if getattr(value, key) not in (None, UNSET)
    }
    return [figure for figure in FIGURES if figure in known] or [""]


def _raw(value: Cell, figure: str) -> Any:
    if isinstance(value, Summary):
        found = getattr(value, figure or "mean")
        return None if found is UNSET else found
    return value if figure in ("", "mean") else None


def as_json(analysis: Analysis) -> str:
    tables = [
        {
            "name": f.name,
            "title": f.title,
            "definition": f.definition,
            "head": f.head,
            "rows": to_builtins(f.rows, enc_hook=str),
        }
        for f in analysis.results
    ]
    return json.dumps({"tables": tables, "left_out": analysis.left_out}, indent=2, allow_nan=False) + "\n"


FORMATS = {"markdown": markdown, "csv": comma_separated, "latex": latex, "json": as_json}
