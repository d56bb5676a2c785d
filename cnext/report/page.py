"""Sections as one HTML file, which needs nothing from elsewhere and lets nothing in, and as Markdown."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cnext.report import plots
from cnext.report.blocks import FILES, Section, escape
from cnext.tables.formats import mark

COLOURS = (
    "Colours: Okabe and Ito's palette, darkened for contrast; heat maps from vermilion (less) to blue (more). What "
    "they tell also stands in figures or words. Tables sort by their heads and can be copied where scripts may run."
)


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def html(sections: list[Section]) -> str:
    """The page; its first section is the head. A content policy keeps it from loading or running anything else."""
    names = ("ink", "muted", "faint", "paper")
    light = (plots.INK, plots.MUTED, plots.FAINT, plots.PAPER)
    bright, dark = (
        ":root{" + "".join(f"--{name}:{colour};" for name, colour in zip(names, colours, strict=True)) + "}"
        for colours in (light, [plots.DARK[colour] for colour in light])
    )
    head, *rest = sections
    script = _file("page.js")
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    body = "".join(
        f'<section><h2 id="s{number}">{escape(section.title)}</h2>'
        f"{''.join(block.html() for block in section.blocks)}</section>"
        for number, section in enumerate(rest, 1)
    )
    contents = " ".join(f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(rest, 1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(head.title)}</title>"
        f"<style>{bright}@media screen and (prefers-color-scheme:dark){{{dark}}}{_file('style.css')}</style></head>"
        f"<body><main><header><h1>{escape(head.title)}</h1>{''.join(block.html() for block in head.blocks)}</header>"
        f'<nav aria-label="Sections">{contents}</nav>'
        f"{body}<footer><p>{escape(COLOURS)}</p></footer></main><script>{script}</script></body></html>\n"
    )


def markdown(sections: list[Section]) -> str:
    """The same as Markdown, whose pictures are files."""
    parts = []
    for level, section in zip(["#", *["##"] * len(sections)], sections, strict=False):
        parts += [f"{level} {mark(section.title)}", *(block.markdown() for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def write_pictures(sections: list[Section], folder: Path) -> None:
    """Writes the pictures that the Markdown names."""
    (folder / FILES).mkdir(exist_ok=True)
    for section in sections:
        for picture in section.pictures():
            (folder / FILES / picture.name).write_bytes(picture.data)
