"""The content of a report as dataclasses: paragraphs, tables, plots and strips of samples, all of them plain text."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from urllib.parse import quote

LONG = 24
"""A column of words with longer cells may break its lines."""
WIDE = 110
"""Letters in a line of a table, above which they become smaller."""
IN_URLS = " !$()*+,-./:;=?@[]^_`{|}~'&<>"
"""What a browser reads in a data URL as it is; a page escapes what HTML reserves."""


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: "" or a class of the style sheet ("banner", "facts", "missing" or "task")."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Code:
    """A command to copy."""

    text: str


@dataclass(frozen=True)
class Numbers:
    """Headline figures in a row: (name, value, definition)."""

    numbers: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    words: the other columns that hold words and not numbers.  heat: for each cell, 0 to 1, how deeply its ground is
    coloured; NaN for no colour, [] for a plain table.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: tuple[int, ...] = ()
    heat: Sequence[Sequence[float]] = ()

    def depth(self, row: int, column: int) -> str:
        """The opacity of a cell's ground; "" where it has none."""
        return f"{self.heat[row][column]:.2f}" if self.heat and isfinite(self.heat[row][column]) else ""

    @property
    def dense(self) -> bool:
        """Whether it is so wide that it needs small letters."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        return len(self.head) > 8 or sum(min(width, LONG) + 2 for width in widths) > WIDE

    @property
    def classes(self) -> list[str]:
        """The style class of each column: "" of numbers, else "words" or "words long"."""
        found = ["words" if column in (0, *self.words) else "" for column in range(len(self.head))]
        for column in self.words:
            if column and any(len(row[column]) > LONG for row in self.rows):
                found[column] = "words long"
        return found


@dataclass(frozen=True)
class Key:
    """The colours of a plot and what they stand for, from left to right: (name, colour)."""

    parts: list[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """An SVG or PNG file: inlined in the HTML, a file beside the Markdown. alt: its content in words."""

    name: str
    data: bytes
    alt: str

    @property
    def points(self) -> str:
        """The width of an SVG in points; "" of another picture."""
        found = re.search(rb"width='([\d.]+)pt'", self.data[:500]) if self.name.endswith("svg") else None
        return found[1].decode() if found else ""

    @property
    def url(self) -> str:
        """The picture as a data URL. SVG stays text, a quarter shorter than in base64."""
        if self.name.endswith("svg"):
            return f"data:image/svg+xml,{quote(self.data.decode(), safe=IN_URLS)}"
        kind = "jpeg" if self.name.endswith("jpg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Plots:
    """Pictures side by side or over the whole width.

    kind: a class of the style sheet: "panels", "maps" (heat maps, fewer in a row), "pairs" (two in a row), "wide plot"
    (one, scrolls on a phone) or "fits" (shrinks on a phone).
    """

    pictures: list[Picture]
    kind: str = "panels"


@dataclass(frozen=True)
class Frame:
    """What the model answered at one stage: words, an image, or None, for which ``empty`` is shown."""

    label: str
    content: str | Picture | None
    verdict: str = ""
    empty: str = "no image"


@dataclass(frozen=True)
class Strip:
    """One sample over the stages."""

    prompt: str
    frames: list[Frame]


@dataclass(frozen=True)
class Folded:
    """A table that the reader opens: in Markdown too, as GitHub shows it."""

    summary: str
    table: Table


Block = Text | Code | Numbers | Table | Key | Plots | Strip | Folded


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it; a section without blocks is left out."""

    title: str
    blocks: list[Block]

    def pictures(self) -> list[Picture]:
        """Every picture in the section."""
        plots = [picture for block in self.blocks if isinstance(block, Plots) for picture in block.pictures]
        frames = [frame for block in self.blocks if isinstance(block, Strip) for frame in block.frames]
        return plots + [frame.content for frame in frames if isinstance(frame.content, Picture)]
