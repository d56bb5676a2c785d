"""Matplotlib plots that compare the methods of a study, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnext.analysis.run import points
from cnext.report import plots
from cnext.report.plots import CLEAR, ERROR_COLOURS, FAINT, INK, MUTED, PAPER, SCORE_COLOUR, TITLE, on_lines, panel, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _rows(names: Sequence[str], title: str = "") -> tuple[Figure, Axes]:
    """A figure 4 inches wide, or of a document's column, with a row for each name, under its title, if any."""
    from matplotlib.figure import Figure

    labels, width = [on_lines(name, 24) for name in names], min(4.0, plots.COLUMN.get())
    lines = on_lines(title, TITLE)
    head = 0.16 * len(lines) + 0.06
    height = (0.11 + 0.13 * max(map(len, labels))) * len(names) + 0.24 + head
    left = 0.2 + 0.075 * max(len(line) for label in labels for line in label)
    figure = Figure(figsize=(width, height))
    figure.text(0, 1, "\n".join(lines), size=8.5, weight="bold", va="top")
    axes = figure.add_axes((left / width, 0.24 / height, 1 - (left + 0.1) / width, 1 - (0.24 + head) / height))
    axes.set(ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)))
    axes.set_yticklabels(["\n".join(label) for label in labels])
    axes.tick_params(axis="y", labelsize=8, labelcolor=INK)
    axes.grid(axis="x", color=FAINT, lw=0.4)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, x: float, row: int, value: float, side: int) -> None:
    """Writes a value to the left (side -1) or right (1) of a point."""
    beside: dict[str, Any] = {
        "xytext": (6 * side, 0),
        "textcoords": "offset points",
        "ha": "right" if side < 0 else "left",
    }
    axes.annotate(points(value), (x, row), size=8, weight="bold", va="center", **beside, **CLEAR)


@svg
def accuracy(
    methods: Mapping[str, tuple[Sequence[float], float | None]], title: str, limits: tuple[float, float]
) -> Figure:
    """Avg.ACC of each method, {name: (of each seed, New.ACC)}: a tick a seed, a dot their mean, an open dot New.ACC."""
    figure, axes = _rows(list(methods), title)
    for row, (seeds, new) in enumerate(methods.values()):
        mean = float(np.mean(seeds))
        if new is not None:
            axes.plot([mean, new], [row, row], color=MUTED, lw=1, zorder=2)
            axes.plot(new, row, "o", ms=5, mfc=PAPER, mec=INK, mew=1, zorder=3)
        axes.plot(seeds, [row] * len(seeds), "|", ms=9, color=SCORE_COLOUR, mew=1, zorder=3)
        axes.plot(mean, row, "o", ms=5.5, color=SCORE_COLOUR, zorder=4)
        least = min(*map(float, seeds), mean if new is None else new)
        _label(axes, least, row, mean, -1)
    low, high = limits
    margin = 0.34 if plots.in_document() else 0.26
    axes.set(xlim=(low - margin * (high - low) - 1, high + 0.06 * (high - low) + 1))
    return figure


@svg
def error_types(methods: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Forgetting of each method by error type, {name: {type: points}}: bars stacked from zero; mark: their sum."""
    figure, axes = _rows(list(methods), title)
    for row, parts in enumerate(methods.values()):
        ends = [0.0, 0.0]
        for error, share in parts.items():
            side = int(share > 0)
            axes.barh(row, share, 0.66, left=ends[side], color=ERROR_COLOURS[error], lw=0)
            ends[side] += share
        total = sum(parts.values())
        axes.plot([total, total], [row - 0.42, row + 0.42], color=INK, lw=1.6)
        _label(axes, max(ends[1], total), row, total, 1)
    axes.axvline(0, color=MUTED, lw=0.6)
    low, high = axes.get_xlim()
    axes.set(xlim=(low, high + 0.16 * (high - low)))
    plots.error_key(figure)
    return figure


@svg
def over_stages(lines: np.ndarray, chosen: int, title: str, limits: tuple[float, float]) -> Figure:
    """One row of (methods, T) values over stages 1 to T, the other methods in grey."""
    figure, axes = panel(title)
    stages = np.arange(1, lines.shape[1] + 1)
    others = np.delete(lines, chosen, 0)
    if len(others):  # One path, a third of the bytes of one for each.
        broken = np.column_stack([others, np.full(len(others), np.nan)]).ravel()
        axes.plot(np.tile([*stages, np.nan], len(others)), broken, color=FAINT, lw=0.8)
    line = lines[chosen]
    axes.plot(stages, line, color=SCORE_COLOUR, lw=1.8, marker="o", ms=3.2)
    last = int(np.flatnonzero(np.isfinite(line)).max(initial=0))
    if np.isfinite(line[last]):
        axes.text(stages[last] + 0.26, line[last], points(line[last]), weight="bold", size=8, va="center")
    axes.set(xlim=(0.75, len(stages) + 0.4), ylim=limits, xticks=stages)
    axes.locator_params(axis="y", nbins=3)
    axes.grid(axis="y", color=FAINT, lw=0.4)
    axes.set_axisbelow(True)
    return figure
