"""Write a table of chosen columns as Markdown, CSV, LaTeX, HTML or JSON. Needs neither torch nor numpy."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from msgspec.structs import asdict

from cnext.tables import formats
from cnext.tables.aggregate import Summary
from cnext.tables.columns import HIGHER, LOWER, METHOD, NEITHER, ORDER, Chosen, Head, Row, Value
from cnext.tables.formats import NOTHING, Table


def _shown(head: Head, value: Value, decimals: int) -> str:
    if value is None or (isinstance(value, Summary) and value.mean is None):
        return NOTHING
    if isinstance(value, Summary):
        return formats.cell(value, "+" if head.name == "difference" else "", decimals)
    return formats.p_value(value) if isinstance(value, float) else str(value)


def as_table(chosen: Chosen, decimals: int = 1) -> Table:
    """The table as text, its notes as the caption."""
    several = len(chosen.orders) > 1
    words = 1 + several
    rows, bold, breaks = [], set(), set()
    for place, row in enumerate(chosen.rows):
        names = [row.order, row.method] if several else [row.method]
        rows.append(
            [*map(formats.short, names), *(_shown(head, row.values[head.key], decimals) for head in chosen.heads)]
        )
        bold |= {(place, words + i) for i, head in enumerate(chosen.heads) if head.key in row.best}
        if place and row.order != chosen.rows[place - 1].order:
            breaks.add(place)
    over = [("", words)]
    for head in chosen.heads:
        title = head.column.title if head.task else ""
        if title == over[-1][0]:
            over[-1] = (title, over[-1][1] + 1)
        else:
            over.append((title, 1))
    heads = [*([ORDER, METHOD] if several else [METHOD]), *(head.task or head.column.title for head in chosen.heads)]
    given = (" ".join(chosen.notes), heads, rows, words)
    return Table(*given, over if len(over) > 1 else [], frozenset(bold), frozenset(breaks), narrow=True)


def comma_separated(chosen: Chosen) -> str:
    """A line a row, figures not rounded: under the name of a column its mean, and its sd, low and high beside it."""
    figures = {
        head.key: [
            figure
            for figure in ("sd", "low", "high")
            if any(_figure(row.values[head.key], figure) is not None for row in chosen.rows)
        ]
        for head in chosen.heads
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [head.key for head in chosen.heads if head.name != "n"]
    beside = [name for key in keys for name in (key, *(f"{key} {figure}" for figure in figures[key]))]
    writer.writerow([METHOD, ORDER, "n", *beside])
    for row in chosen.rows:
        cells = [_figure(row.values[key], figure) for key in keys for figure in ("mean", *figures[key])]
        writer.writerow([row.method, row.order, row.n, *cells])
    return text.getvalue()


def _figure(value: Value, figure: str) -> Any:
    if not isinstance(value, Summary):
        return value if figure == "mean" else None
    return {name: found for name, found in asdict(value).items() if isinstance(found, float | int)}.get(figure)


def as_json(chosen: Chosen) -> str:
    """Columns, rows with the mean, sd and n of every cell and whether it is the best, and the notes."""

    def cell(row: Row, head: Head) -> Any:
        value = row.values[head.key]
        if not isinstance(value, Summary):
            return value
        known = {figure: _figure(value, figure) for figure in ("n", "mean", "sd", "low", "high")}
        kept = {name: found for name, found in known.items() if found is not None or name in ("n", "mean", "sd")}
        return kept | {"best": head.key in row.best}

    better = {HIGHER: "higher", LOWER: "lower", NEITHER: None}
    value = {
        "setting": chosen.setting,
        "baseline": chosen.baseline,
        "columns": [
            {
                "name": head.key,
                "title": head.column.title,
                "task": head.task or None,
                "best": better[head.column.better],
            }
            for head in chosen.heads
        ],
        "rows": [
            {"method": row.method, "order": row.order, "n": row.n, "reference": row.reference or None}
            | {"values": {head.key: cell(row, head) for head in chosen.heads}}
            for row in chosen.rows
        ],
        "notes": chosen.notes,
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def written(chosen: Chosen, kind: str, decimals: int = 1) -> str:
    """The table in one of ``formats.WRITERS``."""
    if kind in ("csv", "json"):
        return comma_separated(chosen) if kind == "csv" else as_json(chosen)
    table = as_table(chosen, decimals)
    if kind == "latex":
        return formats.as_latex([table])
    return formats.as_html([table]) if kind == "html" else formats.as_markdown([formats.marked(table)])
