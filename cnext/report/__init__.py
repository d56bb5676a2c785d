"""Reports: of a run report.html and report.md, of a study study.html; one HTML file each, which opens offline.

It is made from run folders alone and computes no figure that `analysis` or `tables` has.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cnext.analysis import analyze
from cnext.analysis import formats as analysis_formats
from cnext.analysis.groups import Study
from cnext.analysis.run import Run
from cnext.errors import UserError
from cnext.report import page
from cnext.report.analyses import breaks, drift, transfer
from cnext.report.record import costs, metrics, reproduction, training
from cnext.report.samples import answers, drawings
from cnext.report.scores import headline, matrix, stages, why_it_forgets
from cnext.report.study_page import sections
from cnext.runs.checkpoint import write_text
from cnext.tables import aggregate, formats

SECTIONS = (
    headline,
    matrix,
    stages,
    why_it_forgets,
    transfer,
    breaks,
    drawings,
    answers,
    drift,
    training,
    metrics,
    costs,
    reproduction,
)


def write_reports(
    given: Sequence[Path], out: Path | None = None, baseline: str | None = None, mix: bool = False
) -> list[Path]:
    """The report of the one run folder given, or that of the study which several runs or their folders are.

    Args:
        out: folder of the study's files; where None, the folder that holds all that is given.
        baseline: the method of a study to compare with; None: as ``tables.tabulate``.
        mix: whether a study may average over runs of different environments.

    Raises: UserError where there is no run, for runs that are not comparable, and for one run with a study's options.
    """
    [first, *others] = given
    if not others and out is None and any((first / f"{name}.json").is_file() for name in ("config", "results")):
        if baseline or mix:
            raise UserError(
                f"{first} is one run, and --baseline and --mix-environments are for several; leave them out"
            )
        return list(write_report(first))
    folders = aggregate.find(given)
    return write_study(folders, out or _common(given), baseline, mix)


def write_study(folders: Sequence[Path], out: Path, baseline: str | None = None, mix: bool = False) -> list[Path]:
    """Writes a study's page, its tables and its analyses: study.html, study.md (.csv, .tex, .json), analysis.md.

    Raises: UserError as ``Study.read``; nothing is written then.
    """
    study = Study.read(folders, baseline, mix)
    names = {kind: f"study.{suffix}" for kind, suffix in formats.SUFFIXES.items()}
    texts = {names[kind]: write(study.tables) for kind, write in formats.FORMATS.items()}
    analysis = analyze(study)
    texts["study.html"] = page.html(sections(study, analysis, _again(folders, baseline, mix)))
    texts["analysis.md"] = analysis_formats.markdown(analysis)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def _common(paths: Sequence[Path]) -> Path:
    """The folder that holds them all."""
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths]))


def _again(folders: Sequence[Path], baseline: str | None, mix: bool) -> str:
    """The command that makes a study's page; where a folder holds the runs and no others, it is named alone."""
    named = list(map(str, folders))
    if len(folders) > 1 and len({folder.is_absolute() for folder in folders}) == 1:
        above = Path(os.path.commonpath(folders))
        if {path.resolve() for path in aggregate.find([above])} == {path.resolve() for path in folders}:
            named = [str(above)]
    options = [*(["--baseline", baseline] if baseline else []), *(["--mix-environments"] if mix else [])]
    return shlex.join(["cnext", "report", *named, *options])


def write_report(run: Path) -> tuple[Path, Path]:
    """Writes report.html and report.md (its pictures in report_files/) into a run folder, finished or not.

    Args:
        run: folder with results.json and, as far as there are, config.json, cost.json, environment.json, train.jsonl,
            predictions/, checkpoints/ and judge/. A section whose files are missing says so.

    Returns:
        The paths of report.html and report.md.

    Raises:
        UserError: results.json is missing, or one of the files is not what it should be; the message names it.
    """
    record = Run.read(run)
    found = [section for build in SECTIONS if (section := build(record)).blocks]
    html, text = run / "report.html", run / "report.md"
    html.write_text(page.html(found), encoding="utf-8", errors="replace")
    text.write_text(page.markdown(found), encoding="utf-8", errors="replace")
    page.write_pictures(found, run)
    return html, text
