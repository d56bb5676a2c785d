"""Findings as Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

from cnext.analysis import Analysis
from cnext.analysis.finding import Cell, Finding
from cnext.tables.formats import NOTHING, Table, as_latex, as_markdown, cell, mark

FIGURES = ("n", "mean", "sd", "low", "high")


def shown(value: Cell, finding: Finding) -> str:
    """A cell as a reader sees it."""
    if isinstance(value, str):
        return " ".join(value.split())
    if value is None or (isinstance(value, dict) and not value["n"]):
        return NOTHING
    if isinstance(value, int):
        return str(value)
    found = value if isinstance(value, dict) else {"mean": value}
    # Adding zero takes the sign from what is rounded to none.
    rounded = {name: figure and round(figure, finding.decimals) + 0.0 for name, figure in found.items()}
    return cell(rounded, "+" if finding.signed and rounded["mean"] else "", finding.decimals)


def as_table(finding: Finding) -> Table:
    """The finding in words, its title and definition as the caption."""
    rows = [[shown(value, finding) for value in row] for row in finding.rows]
    return Table(f"{finding.title}. {finding.definition}", finding.head, rows, finding.words)


def markdown(analysis: Analysis) -> str:
    """A table each under its definition, then what was left out and why."""
    tables = [as_table(finding) for finding in analysis.findings]
    marked = [
        replace(table, caption=mark(table.caption), rows=[[mark(cell) for cell in row] for row in table.rows])
        for table in tables
    ]
    left = "".join(f"- {mark(f'{name}: {why}')}\n" for name, why in analysis.left_out.items())
    return as_markdown(marked) + (f"\nLeft out:\n\n{left}" if left else "")


def latex(analysis: Analysis) -> str:
    return as_latex([as_table(finding) for finding in analysis.findings])


def comma_separated(analysis: Analysis) -> str:
    """A block a table, whose lines begin with its name; a mean over runs has its n, sd, low and high beside it."""
    blocks = []
    for finding in analysis.findings:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        figures = [_figures([row[i] for row in finding.rows]) for i in range(len(finding.head))]
        names = [
            [name if figure in ("", "mean") else f"{name} {figure}" for figure in found]
            for name, found in zip(finding.head, figures, strict=True)
        ]
        writer.writerow(["table", *(name for found in names for name in found)])
        for row in finding.rows:
            pairs = zip(row, figures, strict=True)
            writer.writerow([finding.name, *(_raw(value, figure) for value, found in pairs for figure in found)])
        blocks.append(text.getvalue())
    return "\n".join(blocks)


def _figures(column: list[Cell]) -> list[str]:
    """The columns that a column of means takes; [""] of any other."""
    known = {key for value in column if isinstance(value, dict) for key in value if value[key] is not None}
    return [figure for figure in FIGURES if figure in known] or [""]


def _raw(value: Cell, figure: str) -> Any:
    if isinstance(value, dict):
        return value.get(figure or "mean")
    return value if figure in ("", "mean") else None


def as_json(analysis: Analysis) -> str:
    tables = [
        {"name": f.name, "title": f.title, "definition": f.definition, "head": f.head, "rows": f.rows}
        for f in analysis.findings
    ]
    return json.dumps({"tables": tables, "left_out": analysis.left_out}, indent=2, allow_nan=False) + "\n"


FORMATS = {"markdown": markdown, "csv": comma_separated, "latex": latex, "json": as_json}
