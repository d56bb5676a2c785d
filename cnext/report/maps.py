"""Heat maps as SVG, panel by panel, written out by hand: a few bytes a cell, in light and dark colours."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cnext.report.plots import DARK, FAINT, INK, MUTED, PAPER, on_lines

MORE, LESS = "#0076b8", "#d55e00"
"""Okabe and Ito's blue and vermilion: apart for every kind of colour vision. Depth, not hue, tells how much."""
DEEPEST = 0.6
"""Opacity of the largest value, so that ink stays readable on it."""
LETTER = 4.6
"""Pixels that a letter takes."""
TITLE = 34
"""Letters that a line of a title holds."""


@dataclass(frozen=True)
class Panel:
    """values: (rows, columns) float64, NaN where there is nothing. rows, columns: their names; none: not written."""

    title: str
    values: np.ndarray
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()


def heat_maps(grid: Sequence[Sequence[Panel]], limit: float, figures: str = "", sides: Sequence[str] = ()) -> bytes:
    """Panels in rows and columns. limit: what is drawn deepest; 0 is empty.

    figures: format of the values, "" for none.  sides: what stands left of each row of panels.
    """
    size = (30, 17) if figures else (9, 9)
    side = max((LETTER * 1.1 * len(name) + 6 for name in sides), default=0.0)
    edges = [max(LETTER * len(name) + 4 for name in ("", *panels[0].rows)) for panels in zip(*grid, strict=True)]
    widths = []
    for panels, edge in zip(zip(*grid, strict=True), edges, strict=True):
        slant = 0.8 * _height(panels[0], size) if figures else 0.0
        title = max(LETTER * 1.15 * len(line) for panel in panels for line in ("", *on_lines(panel.title, TITLE)))
        widths.append(max(edge + panels[0].values.shape[1] * size[0] + slant, title) + 12)
    parts, y = [], 0.0
    for row, panels in enumerate(grid):
        titles = [on_lines(panel.title, TITLE) for panel in panels]
        top = y + max(12 * len(title) for title in titles) + max(_height(panel, size) for panel in panels) + 3
        x = side
        for panel, title, edge, width in zip(panels, titles, edges, widths, strict=True):
            parts += [_text("t", x, y + 9 + 12 * number, line) for number, line in enumerate(title)]
            parts += _panel(panel, x + edge, top, size, limit, figures)
            x += width
        height = panels[0].values.shape[0] * size[1]
        if sides:
            parts.append(_text("t", 0, top + height / 2 + 3, sides[row]))
        y = top + height + 3
    return _svg(side + sum(widths) - 12, y, parts)


def _turn(size: tuple[int, int]) -> int:
    """Degrees by which column names are turned: where columns are narrower than letters are high, upright."""
    return -45 if size[0] > 10 else -90


def _height(panel: Panel, size: tuple[int, int]) -> float:
    """Pixels that turned column names take upwards."""
    return (0.72 if _turn(size) > -90 else 1.0) * LETTER * max(map(len, panel.columns)) + 6 if panel.columns else 0.0


def _panel(panel: Panel, left: float, top: float, size: tuple[int, int], limit: float, figures: str) -> list[str]:
    width, height = size
    parts = [
        _text("m", left - 4, top + (row + 0.5) * height + 3, name, 'text-anchor="end"')
        for row, name in enumerate(panel.rows)
    ]
    for column, name in enumerate(panel.columns):
        x, y = left + (column + 0.5) * width + 2, top - 3
        parts.append(_text("m", x, y, name, f'transform="rotate({_turn(size)} {x:.1f} {y:.1f})"'))
    for (row, column), value in np.ndenumerate(panel.values):
        if np.isfinite(value):
            x, y = left + column * width, top + row * height
            parts.append(_cell(x, y, width, height, value, limit))
            if figures:
                shown = format(value, figures).replace("-", "\N{MINUS SIGN}")
                shown = shown if any(digit in shown for digit in "123456789") else shown[1:]
                parts.append(_text("v", x + width / 2, y + height / 2 + 3, shown))
    return parts


def _text(kind: str, x: float, y: float, text: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>' if text else ""


def _cell(x: float, y: float, width: float, height: float, value: float, limit: float) -> str:
    depth = DEEPEST * min(1.0, abs(value) / limit) if limit else 0.0
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width - 1}" height="{height - 1}"'
    if depth < 0.005:
        return f'<rect class="n" {size}/>'
    return f'<rect class="{"p" if value > 0 else "q"}" {size} fill-opacity="{depth:.2f}"/>'


def _svg(width: float, height: float, parts: list[str]) -> bytes:
    style = (
        "text{font:8px 'Gill Sans','Gill Sans MT','Open Sans',Calibri,system-ui,sans-serif}"
        f".t{{font-weight:bold;fill:{INK}}}.m{{fill:{MUTED};font-size:7.5px}}.v{{fill:{INK};text-anchor:middle}}"
        f".p{{fill:{MORE}}}.q{{fill:{LESS}}}.n{{fill:{FAINT};fill-opacity:.35}}.g{{fill:{PAPER}}}"
        f"@media(prefers-color-scheme:dark){{.t,.v{{fill:{DARK[INK]}}}.m{{fill:{DARK[MUTED]}}}"
        f".n{{fill:{DARK[FAINT]}}}.g{{fill:{DARK[PAPER]}}}}}"
    )
    size = f"{width:.0f} {height:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width:.0f}" height="{height:.0f}">'
        f'<style>{style}</style><rect class="g" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    ).encode()
