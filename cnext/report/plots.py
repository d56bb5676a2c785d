"""Matplotlib plots of one run as SVG with light and dark colours; matplotlib's global state is left alone."""

from __future__ import annotations

import functools
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from cnext.analysis.run import mean_seen, points
from cnext.packages import version
from cnext.report.compact import compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT, PAPER = "#1b1b1a", "#666460", "#d6d3cb", "#fffefa"
DARK = {INK: "#e9e6df", MUTED: "#a5a199", FAINT: "#45433f", PAPER: "#161618"}
# Okabe and Ito's hues, darkened until each has a contrast of 3 or more on both papers.
TASK_COLOURS = ("#0076b8", "#d55e00", "#009066", "#bc5f94", "#957000", "#6d68c9", "#3a8f9e", "#8a6f5c")
SCORE_COLOUR = TASK_COLOURS[0]
# Of different lightness, so that they are distinct without hue.
ERROR_COLOURS = {"hallucination": "#9c3a1c", "instruction_unfollowing": "#d98a55", "other": "#a9a59c"}
ON_ERROR_COLOURS = {"hallucination": "#ffffff", "instruction_unfollowing": "#000000", "other": "#000000"}
MORE, LESS = TASK_COLOURS[:2]
"""Heat maps: colours of positive and negative values, distinct for every kind of colour vision."""
TITLE = 34
"""Letters in a line of a heat map's title."""
DEEPEST = 0.6
"""Opacity of the largest value of a heat map, so that text stays readable on it."""
CENTRED: dict[Any, Any] = {"ha": "center", "va": "center"}
CLEAR: dict[str, Any] = {"bbox": {"fc": PAPER, "ec": "none", "pad": 0.6, "alpha": 0.8}}
"""A label in front of lines."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "savefig.pad_inches": 0.02,
}


def task_colour(index: int) -> str:
    """The one colour of a task, by its place in the suite's training order."""
    return TASK_COLOURS[index % len(TASK_COLOURS)]


COLUMN: ContextVar[float] = ContextVar("COLUMN", default=inf)
"""The width in inches that a figure has at most in a document, where it can be so narrow; infinite on a page."""
FILES: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
"""What is left out of files of each format, so that the same figure is the same file."""
FOR_FILES: dict[Any, Any] = {
    "savefig.bbox": "tight",
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.hashsalt": "cnext",
}
"""Style of files. pdf.fonttype 42: text stays text."""


class Drawing(bytes):
    """A figure as SVG for a page. ``as_file`` draws it again for a document, in one of ``FILES``."""

    _draw: Callable[[], Figure]

    @classmethod
    def of(cls, page: bytes, draw: Callable[[], Figure]) -> Drawing:
        """page: the SVG for a page.  draw: draws it."""
        made = cls(page)
        made._draw = draw
        return made

    def as_file(self, kind: str, column: float) -> bytes:
        """The same bytes each time. column: the greatest width in inches, of a figure that can be so narrow."""
        import matplotlib

        buffer, before = io.BytesIO(), COLUMN.set(column)
        try:
            with matplotlib.rc_context(STYLE | FOR_FILES):
                self._draw().savefig(buffer, format=kind, facecolor="white", metadata=FILES[kind])
        finally:
            COLUMN.reset(before)
        return buffer.getvalue()


def in_document() -> bool:
    """Whether the figure is drawn for a document, where no page has the key beside it."""
    return isfinite(COLUMN.get())


def svg(draw: Callable[..., Figure], crop: bool = False) -> Callable[..., Drawing]:
    """Turns a function that draws a figure into one that returns it as SVG, the same bytes for the same arguments.

    crop: whether the picture ends where the drawing does, even outside of the figure.
    """

    @functools.wraps(draw)
    def render(*args: object, **options: object) -> Drawing:
        if version("matplotlib") is None:
            return Drawing(_no_figure())
        import matplotlib

        buffer = io.BytesIO()
        style: dict[Any, Any] = STYLE | {"svg.hashsalt": draw.__name__, "savefig.bbox": "tight" if crop else None}
        with matplotlib.rc_context(style):
            figure = draw(*args, **options)
            figure.savefig(buffer, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None})
        head, mark, body = buffer.getvalue().partition(b"<defs>")
        page = compact(head + _stylesheet(body.decode()).encode() + mark + body)
        return Drawing.of(page, functools.partial(draw, *args, **options))

    return render


def _no_figure() -> bytes:
    """What stands in for a figure where matplotlib is not installed."""
    lines = ("Figure left out: it needs matplotlib.", "pip install 'cnext[report]', then cnext report RUN")
    text = "".join(f'<text x="0" y="{14 + 14 * row}" font-size="10">{line}</text>' for row, line in enumerate(lines))
    head = '<svg xmlns="http://www.w3.org/2000/svg" width="230pt" height="36pt" viewBox="0 0 230 36">'
    return f'{head}<g fill="{MUTED}" font-family="sans-serif">{text}</g></svg>'.encode()


def _stylesheet(drawn: str) -> str:
    """Rules that replace the light colours drawn by the dark ones; a viewer without style sheets shows the former."""
    dark = "".join(
        f'[style*="{part}:{light}"]{{{part}:{colour}!important}}'
        for light, colour in DARK.items()
        for part in ("fill", "stroke")
        if f"{part}: {light}" in drawn
    )
    font = "text{font-family:'Gill Sans','Gill Sans MT','Open Sans',Calibri,system-ui,sans-serif!important}"
    return f"<style>{font}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def on_lines(name: str, width: int) -> list[str]:
    """A name in lines of at most ``width`` letters, broken at blanks, hyphens and commas; [] for an empty name."""
    return textwrap.wrap(re.sub(r",\s*", ", ", name), width)


def panel(title: str, left: float = 0.28, right: float = 0.42, height: float = 0.95) -> tuple[Figure, Axes]:
    """A figure 2.15 inches wide with its title and one pair of axes of that height, between margins in inches."""
    from matplotlib.figure import Figure

    titles = on_lines(title, 28)
    width, bottom, more = 2.15, 0.22, 0.142 * max(0, len(titles) - 1)
    total = bottom + height + 0.32 + more
    figure = Figure(figsize=(width, total))
    figure.text(0, 1 - (0.11 + more / 2) / total, "\n".join(titles), size=8.5, weight="bold", va="center")
    return figure, figure.add_axes((left / width, bottom / total, 1 - (left + right) / width, height / total))


@svg
def score_matrix(scores: np.ndarray, stages: Sequence[str], tasks: Sequence[str], learnt: Sequence[int]) -> Figure:
    """Heat map of (S, T) scores; under each value its change since the task was learnt; stage average at right.

    learnt: for each task the row of the stage that learns it; row 0 is zero-shot.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count, longest = len(tasks), max(map(len, stages))
    label, cell, head, sizes = 0.2 + 0.075 * longest, (0.82, 0.42), 0.34, (8, 9.5, 7)
    slanted = max(map(len, tasks)) > 11
    head += 0.7 * slanted
    if label + cell[0] * (count + 1.15) > COLUMN.get():
        label, sizes, slanted = 0.1 + 0.06 * longest, (6.5, 6.5, 5.5), True
        head = 0.12 + 0.04 * max(map(len, [*tasks, "average"]))
        # The last slanted name ends 0.35 inches to the right of the cells.
        cell = (max(0.3, (COLUMN.get() - label - 0.35) / (count + 1.15)), 0.3)
    width, height = label + cell[0] * (count + 1.15), head + cell[1] * (len(stages) + 0.25)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-label / cell[0], count + 1.15), ylim=(len(stages) + 0.25, -head / cell[1]))
    axes.axis("off")
    slant: dict[str, Any] = {"rotation": 35, "ha": "left"} if slanted else {"ha": "center"}
    for column, task in enumerate([*tasks, "average"]):
        place = (column + 0.5 + 0.12 * (column == count), -0.22)
        axes.text(*place, task, color=MUTED, va="bottom", size=sizes[0], **slant)
    for stage, name in enumerate(stages):
        top = stage + 0.2 * (stage > 0)
        axes.text(-label / cell[0], top + 0.5, name, va="center", color=MUTED, size=sizes[0])
        average = mean_seen(scores[stage][[not stage or row <= stage for row in learnt]])
        if np.isfinite(average):
            axes.text(count + 0.62, top + 0.5, points(average), weight="bold", size=sizes[1], **CENTRED)
        for column, value in enumerate(scores[stage]):
            if not np.isfinite(value):
                continue
            corner, size, depth = (column + 0.02, top + 0.04), (0.96, 0.92), 0.06 + 0.64 * value / 100
            axes.add_patch(Rectangle(corner, *size, color=SCORE_COLOUR, alpha=depth, lw=0))
            if stage == learnt[column]:
                axes.add_patch(Rectangle(corner, *size, fill=False, ec=INK, lw=1.2))
            later = stage > learnt[column] and np.isfinite(scores[learnt[column], column])
            axes.text(column + 0.5, top + (0.36 if later else 0.5), points(value), size=sizes[1], **CENTRED)
            if later:
                change = points(value - scores[learnt[column], column], signed=True)
                axes.text(column + 0.5, top + 0.74, change, size=sizes[2], **CENTRED)
    return figure


@svg
def accuracy(scores: np.ndarray, task: int | None, title: str) -> Figure:
    """Score of one task over the stages, the others in grey; None: the stage average."""
    lines = np.where(np.arange(len(scores))[:, None] > np.arange(scores.shape[1]), scores, np.nan)
    last = int(np.flatnonzero(np.isfinite(lines).any(1)).max(initial=0))
    figure, axes = panel(title)
    axes.plot(np.delete(lines, [] if task is None else task, 1), color=FAINT, lw=0.8)
    line: Any
    if task is None:
        line = np.array([np.nan, *map(mean_seen, lines[1 : last + 1])])
        colour, start, width = INK, mean_seen(scores[0]), 2.4
    else:
        line, colour, start, width = lines[: last + 1, task], task_colour(task), scores[0, task], 1.6
    seen = np.flatnonzero(np.isfinite(line))
    if len(seen):
        first, end = seen[0], seen[-1]
        axes.plot([0, first], [start, line[first]], color=colour, lw=0.7, ls=(0, (1, 2)))
        axes.plot(line, color=colour, lw=width, marker="o", ms=3.2)
        axes.text(end + 0.26, line[end], points(line[end]), weight="bold", size=8, va="center")
        if end > first:
            axes.text(first, line[first] + 7, points(line[first]), ha="center", color=MUTED, size=7, **CLEAR)
    axes.plot(0, start, "o", ms=3.6, mfc=PAPER, mec=colour, mew=1)
    axes.set(xlim=(-0.25, len(scores) - 0.6), ylim=(-4, 108), xticks=range(len(scores)), yticks=(0, 50, 100))
    axes.grid(axis="y", color=FAINT, lw=0.4)
    axes.set_axisbelow(True)
    return figure


def error_key(figure: Figure) -> None:
    """The colours of error types below a figure in a document."""
    from matplotlib.patches import Patch

    if in_document():
        parts = [Patch(color=colour, label=error.replace("_", " ")) for error, colour in ERROR_COLOURS.items()]
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        figure.legend(handles=parts, fontsize=7, frameon=False, handlelength=1, **place)


@svg
def errors(shares: dict[str, dict[str, float]], title: str) -> Figure:
    """Stacked error shares in percent of all samples, one bar for each time: {"learnt": {error: share}, "end": ...}."""
    figure, axes = panel(title, left=0.42, right=0.16, height=0.19 * len(shares))
    for row, parts in enumerate(shares.values()):
        left = 0.0
        for error, share in parts.items():
            axes.barh(row, share, 0.72, left=left, color=ERROR_COLOURS[error], lw=0)
            if 10 <= share < sum(parts.values()):
                axes.text(left + share / 2, row, f"{share:.0f}", color=ON_ERROR_COLOURS[error], size=7, **CENTRED)
            left += share
        axes.text(left + 1.5, row, points(left), size=8, weight="bold", va="center_baseline")
    axes.set(xlim=(0, 100), ylim=(len(shares) - 0.5, -0.5), xticks=(0, 50, 100), yticks=range(len(shares)))
    axes.set_yticklabels(list(shares))
    error_key(figure)
    return figure


@svg
def loss(values: np.ndarray, task: int, title: str) -> Figure:
    """Training loss of (steps,) values: mean of at most 60 bins of steps, and the band from minimum to maximum."""
    finite = values[np.isfinite(values)]
    figure, axes = panel(title)
    if len(finite):
        bins = np.array_split(values, min(60, len(values)))
        ends = np.cumsum([len(part) for part in bins])
        middle = ends - np.array([len(part) for part in bins]) / 2
        least, means, greatest = (np.array([f(part) for part in bins]) for f in (np.min, np.mean, np.max))
        axes.fill_between(middle, least, greatest, color=task_colour(task), alpha=0.25, lw=0)
        axes.plot(middle, means, color=task_colour(task), lw=1.4)
        axes.text(len(values) * 1.02, means[-1], f"{means[-1]:.2f}", weight="bold", size=8, va="center")
        axes.set(xlim=(0, len(values)), ylim=(0, finite.max() * 1.05), xticks=(0, len(values)))
        axes.set_yticks((0, finite.max()), ("0", f"{finite.max():.1f}"))
    return figure


@svg
def retention(branch: dict[int, tuple[float, float]], count: int, title: str) -> Figure:
    """Beta, the weight of a parameter's old average, of one branch over the stages: {stage: (mean, std)}."""
    stages, means, spreads = list(branch), *zip(*branch.values(), strict=True)
    figure, axes = panel(title)
    axes.errorbar(stages, means, spreads, color=MUTED, lw=0, elinewidth=0.8)
    axes.plot(stages, means, "o", ms=4, color=INK)
    for stage, mean, spread in zip(stages, means, spreads, strict=True):
        axes.text(stage, mean + spread + 0.04, f"{mean:.2f}".removeprefix("0"), size=7, ha="center")
    axes.set(xlim=(0.5, count + 0.5), ylim=(-0.04, 1.15), xticks=range(1, count + 1), yticks=(0, 0.5, 1))
    axes.set_yticklabels(("0", ".5", "1"))
    axes.grid(axis="y", color=FAINT, lw=0.4)
    return figure


@dataclass(frozen=True)
class Panel:
    """One heat map: (rows, columns) float64 values, NaN for an empty cell, and labels of rows and columns, if any."""

    title: str
    values: np.ndarray
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()


@functools.partial(svg, crop=True)
def heat_maps(grid: Sequence[Sequence[Panel]], limit: float, values: str = "", sides: Sequence[str] = ()) -> Figure:
    """A grid of heat maps of one shape: opacity |value| / limit, blue above zero, vermilion below, grey at zero.

    Args:
        limit: the value of the deepest colour.
        values: format of the values written into the cells; "": none, and smaller cells.
        sides: label of each row of panels.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    lines, across = grid[0][0].values.shape
    high, wide = (0.22, 0.38) if values else (0.12, 0.12)
    figure = Figure(figsize=(wide * across * len(grid[0]), high * lines * len(grid)))
    margins = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.1, "hspace": 0.15}
    places = figure.subplots(len(grid), len(grid[0]), squeeze=False, gridspec_kw=margins)
    for (row, column), axes in np.ndenumerate(places):
        panel = grid[row][column]
        width = max(12, int(wide * across / 0.07)) if len(grid[0]) > 1 else TITLE
        axes.set_title("\n".join(on_lines(panel.title, width)), loc="left", size=8.5, weight="bold")
        depth = DEEPEST * np.minimum(1.0, abs(panel.values) / (limit or np.inf))
        cells = np.zeros((lines, across, 4))
        cells[..., :3] = np.where(panel.values[..., None] > 0, to_rgb(MORE), to_rgb(LESS))
        cells[..., 3] = np.nan_to_num(depth)
        cells[depth < 0.005] = (*to_rgb(MUTED), 0.12)
        axes.imshow(cells, aspect="auto", interpolation="none")
        axes.set_xticks(range(len(panel.columns)), panel.columns)
        axes.tick_params(axis="x", top=True, labeltop=True, labelbottom=False, rotation=45 if values else 90)
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        for label in axes.get_xticklabels() if values else ():
            label.set(ha="left", rotation_mode="anchor")
        if sides and not column:
            axes.set_ylabel(sides[row], rotation=0, ha="right", va="center", weight="bold")
        axes.vlines(np.arange(across + 1) - 0.5, -0.5, lines - 0.5, PAPER, lw=1)
        axes.hlines(np.arange(lines + 1) - 0.5, -0.5, across - 0.5, PAPER, lw=1)
        axes.spines[:].set_visible(False)
        for (i, j), value in np.ndenumerate(panel.values):
            if values and np.isfinite(value):
                shown = format(value, values).replace("-", "\N{MINUS SIGN}")
                axes.text(j, i, shown if set(shown) & set("123456789") else shown[1:], size=7, **CENTRED)
    if in_document() and not values:
        figure.text(0, -0.1 / (high * lines * len(grid)), f"deepest: {limit:.2g}", size=7, color=MUTED, va="top")
    return figure
