"""The report of a run: report.html, one file that opens offline, and report.md with its pictures beside it."""

from __future__ import annotations

from pathlib import Path

from cnext.running.report import plots
from cnext.running.report.blocks import FILES, Section, escape, mark
from cnext.running.report.record import costs, metrics, reproduction, training
from cnext.running.report.run import Run
from cnext.running.report.samples import answers, drawings
from cnext.running.report.scores import headline, matrix, stages, why_it_forgets

SECTIONS = (headline, matrix, stages, why_it_forgets, drawings, answers, training, metrics, costs, reproduction)


def write_report(run: Path) -> tuple[Path, Path]:
    """Writes report.html and report.md (its pictures in report_files/) into a run folder, finished or not.

    Args:
        run: folder with results.json and, as far as there are, config.json, cost.json, environment.json, train.jsonl
            and predictions/.

    Returns:
        The paths of report.html and report.md.

    Raises:
        UserError: results.json is missing, or one of the files is not what it should be; the message names it.
    """
    record = Run.read(run)
    sections = [section for build in SECTIONS if (section := build(record)).blocks]
    page, text, files = run / "report.html", run / "report.md", run / FILES
    page.write_text(_html(sections), encoding="utf-8", errors="replace")
    text.write_text(_markdown(sections), encoding="utf-8", errors="replace")
    files.mkdir(exist_ok=True)
    for section in sections:
        for picture in section.pictures():
            (files / picture.name).write_bytes(picture.data)
    return page, text


def _html(sections: list[Section]) -> str:
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    names = ("ink", "muted", "faint", "paper")
    light = (plots.INK, plots.MUTED, plots.FAINT, plots.PAPER)
    bright, dark = (
        ":root{" + "".join(f"--{name}:{colour};" for name, colour in zip(names, colours, strict=True)) + "}"
        for colours in (light, [plots.DARK[colour] for colour in light])
    )
    head, *rest = sections
    body = "".join(
        f"<section><h2>{escape(section.title)}</h2>{''.join(block.html() for block in section.blocks)}</section>"
        for section in rest
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(head.title)}</title>"
        f"<style>{bright}@media screen and (prefers-color-scheme:dark){{{dark}}}{style}</style></head>"
        f"<body><main><header><h1>{escape(head.title)}</h1>{''.join(block.html() for block in head.blocks)}</header>"
        f"{body}</main></body></html>\n"
    )


def _markdown(sections: list[Section]) -> str:
    parts = []
    for level, section in zip(["#", *["##"] * len(sections)], sections, strict=False):
        parts += [f"{level} {mark(section.title)}", *(block.markdown() for block in section.blocks)]
    return "\n\n".join(parts) + "\n"
