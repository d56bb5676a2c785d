"""Checks a suite's data files: missing, malformed or repeated rows, references, broken images, overlap of splits.

Of each row only hashes are kept in memory, and no images.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Protocol

from cnext.errors import UserError
from cnext.image_files import Inspection, inspect
from cnext.scoring.base import TRIED, reference_check, try_scorer
from cnext.tasks import tables
from cnext.tasks.base import DataError, ImageNeed, Sample, Suite, Task, any_size, caption_of
from cnext.tasks.formats import left_out, missing_media, no_image, row_problem, scan
from cnext.tasks.rows import files

LOOKS = ("none", "verify", "decode")
"""How images are checked: not at all, whether their files are complete, every pixel."""
THREADS, CHUNK = 8, 2048
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREFERENCED_LISTED = 1000
"""Most unreferenced images in a report."""
_ANSWER_FORMAT = re.compile(
    r"answer (the|each) question using a single word or phrase\.?"
    r"|when the provided information is insufficient, respond with .unanswerable.\.?"
)


class Progress(Protocol):
    """Receives the progress of a check."""

    def begin(self, doing: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@dataclass
class SplitReport:
    """One split of a task. Lists contain origins of rows, or paths.  published: number of rows, 0 if unknown."""

    files: int = 0
    rows: int = 0
    published: int = 0
    without_image: int = 0
    images: int = 0
    lacking: list[str] = field(default_factory=list)
    """Missing files and folders of images, with the path where they are expected, and where they come from."""
    malformed: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    """Test rows with a reference that the scorer cannot use, or to which no answer is right; a scorer that fails."""
    missing_images: list[str] = field(default_factory=list)
    broken_images: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unusable: dict[str, int] = field(default_factory=dict)
    """Number of rows that ``--on-bad-row skip`` leaves out, by reason."""
    converted: dict[str, list[str]] = field(default_factory=dict)
    """Images that are not shown as they are stored, by what is done to them; known where every pixel is decoded."""

    @property
    def miscounted(self) -> bool:
        """Whether the files have another number of rows than published."""
        return bool(self.files and self.published and self.rows != self.published)

    @property
    def problems(self) -> int:
        """Number of problems for a run. Repeated rows, rows left out by the image filter and images that are converted
        do not count."""
        found = (self.lacking, self.malformed, self.references, self.missing_images, self.broken_images)
        return self.miscounted + sum(map(len, found))


@dataclass
class TaskReport:
    """A task's splits. shared_items: the same question about the same image in two splits.  shared_images: the same
    image in two splits, which does not count as a problem."""

    splits: dict[str, SplitReport] = field(default_factory=dict)
    shared_items: list[str] = field(default_factory=list)
    shared_images: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Result of ``check``. unreferenced: number of image files that no row names, and the first of them."""

    suite: str
    data: str
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    unreferenced: int = 0
    unreferenced_images: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """Number of problems; 0 if the data can be used."""
        splits = sum(split.problems for task in self.tasks.values() for split in task.splits.values())
        return splits + sum(len(task.shared_items) for task in self.tasks.values())

    def as_dict(self) -> dict[str, Any]:
        """The report for a JSON file, with every line and path."""
        return {"problems": self.problems, **asdict(self)}


@dataclass
class _Seen:
    """Hashes of a split's rows and questions, and its images, each with its first origin. read: images to read."""

    rows: dict[int, str] = field(default_factory=dict)
    questions: dict[int, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)


def check(suite: Suite, data: Path, progress: Progress, look: str = "decode", need: ImageNeed = any_size) -> Report:
    """Checks every row of every split of a suite's tasks and every image that they name.

    Args:
        data: the data folder.
        look: how images are checked, one of ``LOOKS``.
        need: of the backbone that will read the images.

    Raises:
        UserError: ``data`` is not a folder.
    """
    if not data.is_dir():
        raise UserError(f"expected a folder with the files of suite {suite.name}, found none: {data}")
    report = Report(suite.name, str(data.absolute()))
    looked: dict[str, Inspection] = {}
    for task in suite.sets:
        found = report.tasks[task.name] = TaskReport()
        seen = {}
        for split in task.splits:
            found.splits[split], seen[split] = _check_split(task, data, split, progress, suite.source)
            if look != "none":
                progress.begin(f"{task.name} {split} images", len(seen[split].images))
                _look(seen[split].images, looked, look == "decode", progress)
                _report_images(found.splits[split], seen[split], looked, need)
            else:
                looked |= dict.fromkeys(seen[split].images, Inspection())
            _report_left_out(found.splits[split], task, data, split, looked, need, sizes=look != "none")
        for one, other in combinations(task.splits, 2):
            found.shared_items += _shared(seen[one].questions, seen[other].questions)
            found.shared_images += _shared(seen[one].images, seen[other].images)
    folders = {data / task.image_folder(split) for task in suite.sets for split in task.splits}
    progress.begin("images that no row names", 0)
    for path in _images_in(folders):
        if path not in looked:
            report.unreferenced += 1
            if report.unreferenced <= UNREFERENCED_LISTED:
                report.unreferenced_images.append(path)
    return report


def _check_split(task: Task, data: Path, split: str, progress: Progress, source: str) -> tuple[SplitReport, _Seen]:
    """Reads the files of a split. source: of these, as suite.json says."""
    report, seen = SplitReport(published=getattr(task, f"{split}_count", 0)), _Seen()
    unscored = None if split == "train" else reference_check(task)
    tried: list[Sample] = []
    try:
        paths = files(data, getattr(task, split))
        report.files = len(paths)
        progress.begin(f"{task.name} {split}", sum(map(tables.size, paths)))
        for line in scan(task, data, split, progress.advance):
            report.rows += 1
            if line.sample is None:
                report.malformed.append(f"{line.origin}: {line.problem}")
                continue
            sample = line.sample
            if missing := missing_media(sample):
                report.malformed.append(f"{line.origin}: {missing}")
            if unscored and (flaw := unscored(sample)):
                report.references.append(f"{line.origin}: {flaw.text}")
            if len(tried) < TRIED and (sample.target_image is None or sample.target_image.is_file()):
                tried.append(sample)
            seen.read |= {str(sample.image)} if sample.image else set()
            shown = [str(image) for image in sample.images]
            report.without_image += not shown
            for image in shown:
                seen.images.setdefault(image, line.origin)
            texts = [text for turn in sample.turns for text in (turn.instruction, turn.answer)]
            media = [str(path) for _, path in sorted(sample.media.items())]
            first = seen.rows.setdefault(_hash(*shown, *media, *texts), line.origin)
            if first != line.origin:
                report.repeated.append(f"{line.origin} = {first}")
            for question in _questions(sample):
                seen.questions.setdefault(question, line.origin)
    except DataError as error:
        expected = f"; expected there: {report.published:,} rows" if report.published else "; expected"
        report.lacking.append(f"{error}{expected} from {source}" if source and not report.files else str(error))
    try:
        try_scorer(task, [] if split == "train" else tried)
    except UserError as error:
        report.references.append(str(error))
    sound = report.rows - len(report.malformed)
    if "image" in task.reads and sound and not seen.read:
        report.lacking.append(no_image(task, data, split, sound))
    report.images = len(seen.images)
    root, owner = data / task.image_folder(split), task.source or task.name
    for folder, images in _missing_folders(root, seen.images).items():
        report.lacking.append(f"no image folder {folder}; expected there: {len(images):,} images of {owner}")
        for image in images:
            del seen.images[image]
    if not (report.rows or root.is_dir()):
        report.lacking.append(f"no image folder {root}; expected there: images of {owner}")
    return report, seen


def _missing_folders(root: Path, images: Iterable[str]) -> dict[str, list[str]]:
    """Images by the folder that they lack: the image folder, or one below it that is not there."""
    lacking: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for image in images:
        parent = os.path.dirname(image)
        if parent not in lacking:
            inside = Path(parent).is_relative_to(root)
            above = [Path(parent), *Path(parent).parents] if inside else []
            missing = [str(path) for path in above if path.is_relative_to(root) and not path.is_dir()]
            lacking[parent] = missing[-1] if missing else ""
        if folder := lacking[parent]:
            found.setdefault(folder, []).append(image)
    return found


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def _questions(sample: Sample) -> Iterator[int]:
    """A hash of every question and what it is about, without the phrases in which training and test files differ."""
    about = [str(sample.image), *(str(path) for _, path in sorted(sample.media.items()))]
    for turn in sample.turns:
        bare = _ANSWER_FORMAT.sub("", caption_of(turn.instruction).casefold())
        yield _hash(*about, " ".join(bare.split()))


def _shared(one: dict[Any, str], other: dict[Any, str]) -> list[str]:
    return sorted(f"{other[key]} = {origin}" for key, origin in one.items() if key in other)


def _look(images: Collection[str], looked: dict[str, Inspection], decode: bool, progress: Progress) -> None:
    """Inspects every image that was not inspected before, in parallel."""
    new = iter([image for image in images if image not in looked])
    progress.advance(sum(image in looked for image in images))
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(new, CHUNK)):
            for image, found in zip(chunk, pool.map(lambda image: inspect(Path(image), decode), chunk), strict=True):
                looked[image] = found
                progress.advance(1)


def _report_images(report: SplitReport, seen: _Seen, looked: dict[str, Inspection], need: ImageNeed) -> None:
    """Adds what was found of a split's images to its report."""
    for image, origin in seen.images.items():
        found = looked[image]
        named = f"named first by {origin}"
        if found.fault == "missing":
            report.missing_images.append(f"{image}, {named}")
        elif found.fault:
            report.broken_images.append(f"{image} {found.fault.removeprefix('broken ')}, {named}")
        elif image in seen.read and (why := need(found.size)):
            report.broken_images.append(f"{image} ({found.size[0]} x {found.size[1]} pixels, {why}), {named}")
        for conversion in found.converted:
            report.converted.setdefault(conversion, []).append(f"{image}, {named}")


def _report_left_out(
    report: SplitReport,
    task: Task,
    data: Path,
    split: str,
    looked: dict[str, Inspection],
    need: ImageNeed,
    sizes: bool,
) -> None:
    """Adds the rows that a run leaves out: by the task's image filter, and where unusable rows are to be skipped.

    sizes: whether those of images were looked at.
    """
    if not report.rows or (task.image_filter == "none" and not report.problems):
        return
    check = None if split == "train" else reference_check(task)
    for line in scan(task, data, split):
        if problem := row_problem(line, looked, need, check):
            report.unusable[problem.reason] = report.unusable.get(problem.reason, 0) + 1
        elif sizes and line.sample and (why := left_out(line.sample, task, split)):
            report.left_out.append(f"{line.origin}: {why}")


def _images_in(folders: Iterable[Path]) -> Iterator[str]:
    """Every image file below some folders, once each, also if one folder is inside another."""
    visited: set[str] = set()
    waiting = [str(folder) for folder in sorted(folders) if folder.is_dir()]
    while waiting:
        folder = waiting.pop()
        if folder in visited:
            continue
        visited.add(folder)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.is_dir():
                    if entry.name.lower().endswith(SUFFIXES):
                        yield entry.path
                elif not (entry.is_symlink() and _above(entry.path, folder)):
                    waiting.append(entry.path)


def _above(link: str, folder: str) -> bool:
    """Whether a link points to the folder that contains it, or above: a loop."""
    real = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(link), real]) == os.path.realpath(link)
