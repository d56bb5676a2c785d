"""Show a result: as text, as HTML in a notebook, as a rich table; as a DataFrame and as a matplotlib Figure."""

from __future__ import annotations

import importlib.util
import inspect
import io
import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

from cnext import packages
from cnext.errors import UserError
from cnext.tables.formats import NOTHING

if TYPE_CHECKING:
    import pandas
    import rich.table
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

CELL = "padding:.2em .7em;border:0;border-bottom:1px solid rgba(128,128,128,.35);background:none;color:inherit"
"""Neither text nor paper has a colour of its own, so that a table fits light notebooks and dark ones."""
SHADE = "rgba(0,118,184,{:.2f})"
"""Blue behind a score, the deeper the higher; the text on it stays readable on both papers."""
DEEPEST = 0.4
LETTERS = 17
"""Letters of a figure's caption in an inch."""


@dataclass(frozen=True)
class View:
    """What is shown of a result: a title, one table whose first ``words`` columns are text, and lines below.

    shades: how deep the colour behind each cell is, 0 to 1, by (row, column).
    bold: the cells that stand out.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    words: int = 1
    shades: dict[tuple[int, int], float] | None = None
    bold: frozenset[tuple[int, int]] = frozenset()

    def text(self) -> str:
        """The view in plain text, columns aligned."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                cell.ljust(width) if i < self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in lines
        ]
        return "\n".join([self.title, "", *shown, *(["", *self.notes] if self.notes else [])])

    def html(self) -> str:
        """The view as HTML for a notebook, everything in it escaped."""
        rows = [self._row("th", self.head, {}), *(self._cells(number) for number in range(len(self.rows)))]
        notes = "".join(f'<div style="opacity:.8">{escape(note)}</div>' for note in self.notes)
        return (
            f'<div style="overflow-x:auto;max-width:100%"><div><b>{escape(self.title)}</b></div>'
            f'<table style="border-collapse:collapse;color:inherit;margin:.4em 0;font-variant-numeric:tabular-nums">'
            f"<thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody></table>{notes}</div>"
        )

    def _cells(self, number: int) -> str:
        styles = {}
        for column in range(len(self.rows[number])):
            depth = (self.shades or {}).get((number, column))
            style = "" if depth is None else f";background:{SHADE.format(DEEPEST * min(1.0, max(0.0, depth)))}"
            styles[column] = style + (";font-weight:bold" if (number, column) in self.bold else "")
        return self._row("td", self.rows[number], styles)

    def _row(self, tag: str, cells: Sequence[str], styles: dict[int, str]) -> str:
        made = []
        for column, cell in enumerate(cells):
            side = "left" if column < self.words else "right"
            scope = ' scope="col"' if tag == "th" else ""
            made.append(
                f'<{tag}{scope} style="text-align:{side};{CELL}{styles.get(column, "")}">{escape(cell)}</{tag}>'
            )
        return f"<tr>{''.join(made)}</tr>"

    def rich(self) -> rich.table.Table:
        """The view as a table of rich."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        caption = Text("\n".join(self.notes), justify="left")
        table = Table(title=Text(self.title, style="bold"), title_justify="left", caption=caption, box=box.SIMPLE)
        table.caption_justify = "left"
        for column, name in enumerate(self.head):
            table.add_column(Text(name), justify="left" if column < self.words else "right")
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(c, style="bold" if (number, i) in self.bold else "") for i, c in enumerate(row)))
        return table


class Shown(ABC):
    """Lets a class with a ``view`` be shown by print, rich and notebooks."""

    @abstractmethod
    def view(self) -> View:
        """What is shown."""

    def __str__(self) -> str:
        return self.view().text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.view().rich()

    def _repr_html_(self) -> str:
        return self.view().html()


def figure(value: float | None, decimals: int = 1) -> str:
    """A figure to be shown; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value, decimals) or 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def data_frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """The rows as a DataFrame. Raises UserError where pandas is not installed."""
    if importlib.util.find_spec("pandas") is None:
        raise UserError("to_dataframe() needs the package pandas, which is not installed; pip install pandas")
    import pandas

    return pandas.DataFrame(rows)


def drawn(render: Callable[..., bytes], *values: object, caption: str) -> Figure:
    """The figure that a function of `cnext.report.plots` draws and renders, above a caption.

    Notebooks show it, and need no pyplot for that.

    Raises:
        UserError: matplotlib is not installed.
    """
    packages.require_installed("plot", ["matplotlib"])
    import matplotlib

    from cnext.report import plots

    draw: Callable[..., Figure] = inspect.unwrap(render)  # pyright: ignore[reportAssignmentType]
    with matplotlib.rc_context(plots.STYLE):
        made = draw(*values)
        width, height = made.get_size_inches()
        lines = textwrap.wrap(caption, max(20, int(LETTERS * width)))
        below = 0.12 * len(lines) + 0.08
        share = height / (height + below)  # of the drawing in the higher figure, above the caption
        for axes in made.axes:
            left, bottom, across, up = axes.get_position().bounds
            axes.set_position((left, 1 - share + share * bottom, across, share * up))
        made.set_size_inches(width, height + below)
        made.text(0.02, 0.05 / (height + below), "\n".join(lines), size=7, color=plots.MUTED, va="bottom")
    made.set_facecolor(plots.PAPER)
    # IPython shows figures by itself once pyplot has been imported, which results need not wait for.
    made._repr_png_ = partial(_png, made)  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _png(made: Figure) -> bytes:
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", bbox_inches="tight", dpi=120)
    return buffer.getvalue()
