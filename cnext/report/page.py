"""Render sections as one self-contained HTML file or as Markdown, by the Jinja templates in ``templates/``."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from cnext import durable
from cnext.report import plots
from cnext.report.blocks import Section
from cnext.tables.formats import mark

FILES = "report_files"
"""The folder of the Markdown's pictures."""
LIGHT = {"ink": plots.INK, "muted": plots.MUTED, "faint": plots.FAINT, "paper": plots.PAPER}
DARK = {name: plots.DARK[colour] for name, colour in LIGHT.items()}


@functools.cache
def environment(folder: Path) -> Any:
    """The Jinja environment of a folder of templates: values are escaped as HTML in .html.j2, by ``mark`` in .md.j2."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: str(name).endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"mark": mark, "kind": lambda block: type(block).__name__, "quoted": quoted}
    return made


def quoted(value: str) -> Any:
    """A value for an attribute in double quotes; what may stand there, of which a picture has much, is not escaped."""
    from markupsafe import Markup

    return Markup(value.replace("&", "&amp;").replace('"', "&quot;"))


def _render(template: str, **values: Any) -> str:
    return environment(Path(__file__).with_name("templates")).get_template(template).render(**values)


def html(sections: list[Section]) -> str:
    """The page, the first section as its head. Its content security policy lets it load nothing and run one script."""
    style, script = (
        Path(__file__).with_name("templates").joinpath(name).read_text(encoding="utf-8")
        for name in ("style.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head, *rest = sections
    return _render(
        "report.html.j2", head=head, sections=rest, light=LIGHT, dark=DARK, style=style, script=script, digest=digest
    )


def markdown(sections: list[Section]) -> str:
    """The same as Markdown; its pictures are files in ``FILES``."""
    return _render("report.md.j2", sections=sections, files=FILES)


def write_pictures(sections: list[Section], folder: Path) -> None:
    """Writes the pictures that the Markdown shows, and removes those of an earlier report."""
    durable.make_folder(folder / FILES)
    pictures = {picture.name: picture.data for section in sections for picture in section.pictures()}
    for path in (folder / FILES).iterdir():
        # What begins with a dot is being written, by another report of this run.
        if path.is_file() and path.name not in pictures and not path.name.startswith("."):
            path.unlink(missing_ok=True)
    durable.write_all(folder / FILES, pictures.items())
