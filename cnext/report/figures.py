"""The figures of a report as files for a document: PDF, SVG or PNG, with a caption of each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnext import durable, packages
from cnext.analysis import analyze
from cnext.analysis.groups import RunGroups
from cnext.analysis.run import Run
from cnext.errors import UserError
from cnext.report import SECTIONS, is_run
from cnext.report.blocks import Plots, Section, Text
from cnext.report.plots import Drawing
from cnext.report.study_page import sections
from cnext.runs.checkpoint import write_bytes, write_text
from cnext.tables import aggregate

COLUMN = 3.3
"""Width in inches of a column of a paper in two columns, rounded up."""
CAPTIONS = "captions.md"


@dataclass(frozen=True)
class Figure:
    """A figure of a report. caption: the text above it there.  alt: its content in words."""

    name: str
    drawing: Drawing
    caption: str
    alt: str

    @property
    def group(self) -> str:
        """Its name without the number of figures that are alike."""
        return re.sub(r"_\d+$", "", self.name)


def write_figures(
    given: Sequence[Path],
    out: Path,
    kinds: Sequence[str] = ("pdf",),
    names: Sequence[str] | None = None,
    column: float = COLUMN,
    mix: bool = False,
    mix_data: bool = False,
) -> list[Path]:
    """Writes the figures of one run, or of a study of several, in the order of its report. Returns the files.

    Args:
        given: a run folder, or several, or folders that hold run folders.
        kinds: formats, of ``plots.FILES``.
        names: of figures, or of all that are alike ("stages" for "stages_1" and so on); None: all.
        column: the greatest width in inches, of figures that can be so narrow.
        mix: whether a study may average over runs of different environments.
        mix_data: whether it may average over runs on different data.

    Raises:
        UserError: there is no run, the runs are not comparable, or there is no figure of a name.
    """
    packages.require_installed("cnext plot", ["matplotlib"])
    figures = _chosen(_found(given, mix, mix_data), names)
    durable.make_folder(out)
    paths = []
    for figure in figures:
        for kind in dict.fromkeys(kinds):
            paths.append(out / f"{figure.name}.{kind}")
            write_bytes(paths[-1], figure.drawing.as_file(kind, column))
    parts = [f"## {figure.name}\n\n{figure.caption}\n\nIn words: {figure.alt}.\n" for figure in figures]
    write_text(out / CAPTIONS, "\n".join(parts))
    return [*paths, out / CAPTIONS]


def _found(given: Sequence[Path], mix: bool, mix_data: bool) -> list[Figure]:
    [first, *others] = given
    if not others and is_run(first):
        run = Run.read(first)
        return [figure for build in SECTIONS for figure in _of(build(run))]
    study = RunGroups.read(aggregate.find(given), None, mix, mix_data)
    return [figure for section in sections(study, analyze(study), "") for figure in _of(section)]


def _of(section: Section) -> list[Figure]:
    figures, caption = [], ""
    for block in section.blocks:
        if isinstance(block, Text) and not block.kind:
            caption = block.text
        for picture in block.pictures if isinstance(block, Plots) else ():
            if isinstance(picture.data, Drawing):
                name = picture.name.removesuffix(".svg")
                figures.append(Figure(name, picture.data, caption, picture.alt))
    return figures


def _chosen(figures: list[Figure], names: Sequence[str] | None) -> list[Figure]:
    valid = list(dict.fromkeys(name for figure in figures for name in (figure.group, figure.name)))
    if not figures:
        raise UserError("there is no figure: no stage is evaluated yet; run cnext-run again")
    for name in names or ():
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            groups = ", ".join(dict.fromkeys(figure.group for figure in figures))
            meant = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"unknown figure {name!r}; {meant}valid: {groups}, or one of several by its number, as in its file"
            )
    return [figure for figure in figures if names is None or {figure.name, figure.group} & {*names}]
