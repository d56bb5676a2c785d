"""Reports of runs (report.html, report.md) and of studies (study.html): self-contained HTML made from run folders.

It lays out tables and plots; the figures come from ``cnext.analysis`` and ``cnext.tables``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cnext import durable
from cnext.analysis import analyze
from cnext.analysis import formats as analysis_formats
from cnext.analysis.groups import RunGroups
from cnext.analysis.run import Run
from cnext.errors import UserError
from cnext.report import page
from cnext.report.analyses import breaks, drift, transfer
from cnext.report.record import costs, data, metrics, reproduction, training
from cnext.report.samples import answers, images
from cnext.report.scores import error_types, headline, matrix, stages
from cnext.report.study_page import sections
from cnext.report.validity import beside_the_tasks
from cnext.runs.checkpoint import write_text
from cnext.tables import aggregate, formats

SECTIONS = (
    headline,
    matrix,
    stages,
    error_types,
    transfer,
    breaks,
    images,
    answers,
    drift,
    beside_the_tasks,
    training,
    metrics,
    costs,
    data,
    reproduction,
)


def write_reports(
    given: Sequence[Path],
    out: Path | None = None,
    baseline: str | None = None,
    mix: bool = False,
    mix_data: bool = False,
) -> list[Path]:
    """Writes the report of one run folder, or that of the study made of several runs. Returns the files.

    Args:
        given: a run folder, or several, or folders that hold run folders.
        out: folder of the study's files; None: the common parent of ``given``.
        baseline: the method that a study's tables compare with; None: as ``tables.tabulate``.
        mix: whether a study may average over runs of different environments.
        mix_data: whether it may average over runs on different data.

    Raises:
        UserError: there is no run, the runs are not comparable, or one run comes with options for a study.
    """
    [first, *others] = given
    if not others and out is None and is_run(first):
        if baseline or mix or mix_data:
            raise UserError(
                f"{first} is one run, but --baseline, --mix-environments and --mix-data are for several; leave them out"
            )
        return list(write_report(first))
    folders = aggregate.find(given)
    return write_study(folders, out or _parent(given), baseline, mix, mix_data)


def is_run(path: Path) -> bool:
    """Whether a folder is that of one run."""
    return any((path / f"{name}.json").is_file() for name in ("config", "results"))


def write_study(
    folders: Sequence[Path], out: Path, baseline: str | None = None, mix: bool = False, mix_data: bool = False
) -> list[Path]:
    """Writes a study's page, tables and analyses: study.html, study.md (.csv, .tex, .json), analysis.md. Returns them.

    Raises:
        UserError: as ``RunGroups.read``; nothing is written then.
    """
    study = RunGroups.read(folders, baseline, mix, mix_data)
    names = {kind: f"study.{suffix}" for kind, suffix in formats.SUFFIXES.items()}
    texts = {names[kind]: write(study.tables) for kind, write in formats.FORMATS.items()}
    analysis = analyze(study)
    texts["study.html"] = page.html(sections(study, analysis, _command(folders, baseline, mix, mix_data)))
    texts["analysis.md"] = analysis_formats.markdown(analysis)
    durable.make_folder(out)
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]


def _parent(paths: Sequence[Path]) -> Path:
    """The folder that contains all paths."""
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.resolve() for path in paths]))


def _command(folders: Sequence[Path], baseline: str | None, mix: bool, mix_data: bool) -> str:
    """The command that writes a study's page: names the folder of the runs where it holds no others, else each run."""
    named = list(map(str, folders))
    if len(folders) > 1 and len({folder.is_absolute() for folder in folders}) == 1:
        above = Path(os.path.commonpath(folders))
        if {path.resolve() for path in aggregate.find([above])} == {path.resolve() for path in folders}:
            named = [str(above)]
    options = [*(["--baseline", baseline] if baseline else []), *(["--mix-environments"] if mix else [])]
    options += ["--mix-data"] if mix_data else []
    return shlex.join(["cnext", "report", *named, *options])


def write_report(run: Path) -> tuple[Path, Path]:
    """Writes report.html and report.md (its pictures in report_files/) into a run folder, finished or not.

    Args:
        run: folder with results.json and, optionally, config.json, cost.json, environment.json, train.jsonl,
            predictions/, checkpoints/ and judge/. A section without its files says which are missing.

    Returns:
        The paths of report.html and report.md.

    Raises:
        UserError: results.json is missing, or a file is invalid; the message names it.
    """
    record = Run.read(run)
    found = [section for build in SECTIONS if (section := build(record)).blocks]
    html, text = run / "report.html", run / "report.md"
    durable.write(html, page.html(found).encode(errors="replace"))
    durable.write(text, page.markdown(found).encode(errors="replace"))
    page.write_pictures(found, run)
    return html, text
