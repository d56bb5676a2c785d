"""The pieces that a report is made of. Each renders itself as HTML and as Markdown; all text in them is plain text."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass

from cnext.tables.formats import mark

FILES = "report_files"
SHORT = 24


def escape(text: str) -> str:
    """Plain text as HTML."""
    return html.escape(text)


def mark_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Text:
    """A paragraph; kind: "" or a class of the style sheet (banner, facts, task)."""

    text: str
    kind: str = ""

    def html(self) -> str:
        role = ' role="alert"' if self.kind == "banner" else ""
        return f'<p class="{self.kind}"{role}>{escape(self.text)}</p>'

    def markdown(self) -> str:
        before, after = {"banner": ("> **", "**"), "task": ("### ", "")}.get(self.kind, ("", ""))
        return f"{before}{mark(self.text)}{after}"


@dataclass(frozen=True)
class Code:
    """Text to copy, whose lines break between its words alone."""

    text: str

    def html(self) -> str:
        words = " ".join(f"<span>{escape(word)}</span>" for word in self.text.split(" "))
        return f"<pre><code>{words}</code></pre>"

    def markdown(self) -> str:
        return f"```\n{self.text}\n```"


@dataclass(frozen=True)
class Numbers:
    """Large figures in a row: (name, value, what it means)."""

    numbers: list[tuple[str, str, str]]

    def html(self) -> str:
        parts = (
            f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>{escape(meaning)}</dd></div>"
            for name, value, meaning in self.numbers
        )
        return f'<dl class="numbers">{"".join(parts)}</dl>'

    def markdown(self) -> str:
        return Table(["", "", ""], [list(row) for row in self.numbers], words=(2,)).markdown()


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. words: the columns that hold words and not numbers.

    Columns of more than ``SHORT`` letters a cell may break their lines.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: tuple[int, ...] = ()

    def html(self) -> str:
        longest = (
            [max(map(len, cells)) for cells in zip(*self.rows, strict=True)] if self.rows else [0] * len(self.head)
        )
        kinds = [
            f'class="words{" long" * (column > 0 and longest[column] > SHORT)}"' if column in (0, *self.words) else ""
            for column in range(len(self.head))
        ]
        pairs = zip(self.head, kinds, strict=True)
        head = "".join(f'<th scope="col" {kind}>{escape(name)}</th>' for name, kind in pairs)
        rows = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td {kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        kind = "data dense" if len(self.head) > 8 else "data"
        table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure>{caption}<div class="wide">{table}</div></figure>'

    def markdown(self) -> str:
        sides = [":--" if column in (0, *self.words) else "--:" for column in range(len(self.head))]
        rows = [mark_row([mark(cell) for cell in row]) for row in self.rows]
        table = "\n".join([mark_row([mark(name) for name in self.head]), mark_row(sides), *rows])
        return f"{mark(self.caption)}\n\n{table}" if self.caption else table


@dataclass(frozen=True)
class Key:
    """The parts of stacked bars and their colours, from left to right."""

    parts: list[tuple[str, str]]

    def html(self) -> str:
        parts = (f'<span style="--swatch:{colour}">{escape(name)}</span>' for name, colour in self.parts)
        return f'<p class="key">{" ".join(parts)}</p>'

    def markdown(self) -> str:
        return "From left to right: " + ", ".join(mark(name) for name, _ in self.parts) + "."


@dataclass(frozen=True)
class Picture:
    """An SVG or PNG file: inlined in the HTML, beside the Markdown. alt: what it says, for who cannot see it."""

    name: str
    data: bytes
    alt: str

    def html(self) -> str:
        kind = "svg+xml" if self.name.endswith("svg") else "png"
        return f'<img alt="{escape(self.alt)}" src="data:image/{kind};base64,{base64.b64encode(self.data).decode()}">'

    def markdown(self) -> str:
        return f"![{mark(self.alt)}]({FILES}/{self.name})"


@dataclass(frozen=True)
class Plots:
    """Pictures side by side or over the whole width.

    kind: a class of the style sheet: "panels", "maps" (heat maps, fewer in a row), "wide plot" (which a phone scrolls)
    or "fits" (which a phone shows whole).
    """

    pictures: list[Picture]
    kind: str = "panels"

    def html(self) -> str:
        return f'<div class="{self.kind}">{"".join(picture.html() for picture in self.pictures)}</div>'

    def markdown(self) -> str:
        return "\n".join(picture.markdown() for picture in self.pictures)


@dataclass(frozen=True)
class Frame:
    """One place on a strip: a stage, and what the model wrote or drew there; content None: an empty frame."""

    label: str
    content: str | Picture | None
    verdict: str = ""
    empty: str = "no image"

    def html(self) -> str:
        if self.content is None:
            inner = f'<div class="empty">{escape(self.empty)}</div>'
        elif isinstance(self.content, Picture):
            inner = self.content.html()
        else:
            inner = f"<q>{escape(self.content)}</q>"
        return f"<li><span>{escape(self.label)}</span>{inner}<span>{escape(self.verdict)}</span></li>"

    def markdown(self) -> str:
        if isinstance(self.content, Picture):
            return self.content.markdown()
        return f"*{mark(self.empty)}*" if self.content is None else mark(self.content)


@dataclass(frozen=True)
class Strip:
    """One sample through the stages."""

    prompt: str
    frames: list[Frame]

    def html(self) -> str:
        frames = "".join(frame.html() for frame in self.frames)
        strip = f'<ol style="--count:{len(self.frames)}">{frames}</ol>'
        return f'<figure class="strip"><figcaption>{escape(self.prompt)}</figcaption>{strip}</figure>'

    def markdown(self) -> str:
        rows = [
            [mark(frame.label) for frame in self.frames],
            [":-:"] * len(self.frames),
            [frame.markdown() for frame in self.frames],
            [mark(frame.verdict) for frame in self.frames],
        ]
        return "\n".join([f"**{mark(self.prompt)}**", "", *map(mark_row, rows)])


@dataclass(frozen=True)
class Folded:
    """A table that opens on demand."""

    summary: str
    table: Table

    def html(self) -> str:
        return f"<details><summary>{escape(self.summary)}</summary>{self.table.html()}</details>"

    def markdown(self) -> str:
        return self.table.markdown()


Block = Text | Code | Numbers | Table | Key | Plots | Strip | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]

    def pictures(self) -> list[Picture]:
        """Every picture in the section."""
        plots = [picture for block in self.blocks if isinstance(block, Plots) for picture in block.pictures]
        frames = [frame for block in self.blocks if isinstance(block, Strip) for frame in block.frames]
        return plots + [frame.content for frame in frames if isinstance(frame.content, Picture)]
