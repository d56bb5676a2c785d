"""``cnext data check``: progress bars, then a table of counts and the list of problems."""

from __future__ import annotations

import json
from pathlib import Path

from cnext import durable
from cnext.errors import UserError
from cnext.tasks import suites
from cnext.tasks.base import ImageNeed, any_size
from cnext.tasks.data_check import UNREFERENCED_LISTED, Report, check
from cnext.tasks.left_out import summary

SHOWN, CONVERTED_SHOWN = 10, 2
"""Most lines shown per kind of problem, and per conversion of images; the JSON file has all."""
COLUMNS = ("task", "split", "files", "rows", "published", "malformed", "missing", "broken", "repeated", "no image")


def main(suite: str, folder: Path, images: str, json_file: Path | None, need: ImageNeed = any_size) -> int:
    """Checks the files of a suite and prints the report. Returns 1 if problems were found, else 0.

    need: as for `check`.

    Raises:
        UserError: the folder of ``json_file`` does not exist, or the suite is unknown.
    """
    manifest = suites.load(suite)
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json: expected a file in an existing folder, got {json_file}")
    with Bars() as bars:
        report = check(manifest, folder, bars, images, need)
    if json_file is not None:
        write_json(report, json_file)
    print(text(report))
    return 1 if report.problems else 0


class Bars:
    """Progress bars on standard error, or plain lines where that is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = None

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def begin(self, doing: str, total: int) -> None:
        if not self.console.is_terminal:
            self.console.print(f"checking {doing}", markup=False, soft_wrap=True)
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(doing, total=total or None)

    def advance(self, count: int) -> None:
        if self.task is not None:
            self.bars.advance(self.task, count)


def text(report: Report) -> str:
    """The table of counts, the first lines of every kind of problem, and the number of problems."""
    table: list[list[str]] = [[*COLUMNS]]
    details: list[str] = []
    for name, task in report.tasks.items():
        for label, split in task.splits.items():
            lists = (split.malformed, split.missing_images, split.broken_images, split.repeated)
            counts = (split.files, split.rows, split.published or None, *map(len, lists), split.without_image)
            table.append([name, label, *("-" if count is None else f"{count:,}" for count in counts)])
            details += [f"{name} {label}: {lacking}" for lacking in split.lacking[:SHOWN]]
            if more := len(split.lacking[SHOWN:]):
                details.append(f"{name} {label}: ... and {more:,} more folders of images that are missing")
            if split.miscounted:
                details.append(f"{name} {label}: {split.rows:,} rows, {split.published:,} published")
            details += _listed(f"{name} {label}: malformed", split.malformed)
            details += _listed(f"{name} {label}: references that cannot be scored", split.references)
            details += _listed(f"{name} {label}: missing images", split.missing_images)
            details += _listed(f"{name} {label}: broken images", split.broken_images)
            for conversion, converted in split.converted.items():
                title = f"{name} {label}: images {conversion} (not counted as a problem)"
                details += _listed(title, converted, CONVERTED_SHOWN)
            title = "rows left out of training by the size of their image, as released (not counted as a problem)"
            details += _listed(f"{name} {label}: {title}", split.left_out)
            if unusable := summary(split.unusable):
                details.append(f"{name} {label}: with --on-bad-row skip, {unusable} (of {split.rows:,})")
            details += _listed(f"{name} {label}: repeated rows (not counted as a problem)", split.repeated)
        details += _listed(f"{name}: the same question about the same image in two splits", task.shared_items)
        details += _listed(f"{name}: the same image in two splits (not counted as a problem)", task.shared_images)
    if report.unreferenced:
        title = f"image files that no row names (not counted as a problem): {report.unreferenced:,}, such as"
        details += [title, *(f"  {path}" for path in report.unreferenced_images[:3])]
    verdict = f"{report.problems or 'no'} problem{'' if report.problems == 1 else 's'}"
    heading = f"suite {report.suite} in {report.data}"
    return "\n".join([heading, *_aligned(table), *([""] if details else []), *details, "", verdict])


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    ]


def _listed(title: str, lines: list[str], shown: int = SHOWN) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - shown:,} more"] if len(lines) > shown else []
    return [f"{title}: {len(lines):,}", *(f"  {line}" for line in lines[:shown]), *more]


def write_json(report: Report, path: Path) -> None:
    """Writes a report with every line and path, but at most ``UNREFERENCED_LISTED`` unreferenced images."""
    assert len(report.unreferenced_images) <= UNREFERENCED_LISTED
    durable.write(path, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
