"""Reads a task's files into samples; all problems are reported at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cnext.errors import listed, parse_json
from cnext.image_files import Inspection, inspect
from cnext.regular_files import read_bytes
from cnext.scoring.base import TRIED, Flaw, reference_check, try_scorer
from cnext.tasks.base import DataError, ImageNeed, Sample, Suite, Task, any_size, caption_of
from cnext.tasks.images import unfit
from cnext.tasks.kept_images import ImageBytes
from cnext.tasks.left_out import (
    BROKEN,
    MALFORMED,
    MISSING,
    MISSING_FILE,
    REFERENCE,
    RELEASED_SIZE,
    UNFIT,
    LeftOut,
    Problem,
)
from cnext.tasks.readers import READERS
from cnext.tasks.rows import Row, answers, files, inside, rows, text

DRAW = "Please generate the image: "
"""How instructions to generate an image begin in the released test files, and everywhere with consistent prompts."""


class UnusableRows(DataError):
    """Rows that cannot be used, and that a run may leave out."""


class Line(NamedTuple):
    """One row of a file: its fields and the sample, or what is wrong with it."""

    origin: str
    row: Row
    sample: Sample | None
    problem: str


def read_captions(path: Path) -> dict[int | str, tuple[str, ...]]:
    """Several accepted answers per item from a file in one of two formats.

    Returns:
        COCO's {"annotations": [{"image_id", "caption"}, ...]}: image_id, a number, to captions.
        TextVQA's {"data": [{"question_id", "answers": [...]}, ...]}: question_id, as a string, to answers.

    Raises:
        DataError: the file cannot be read or has another format.
    """
    found: dict[int | str, list[str]] = {}
    try:
        content = parse_json(read_bytes(path))
        if "data" in content:
            found |= {str(item["question_id"]): [*answers(item, "answers")] for item in content["data"]}
        else:
            for annotation in content["annotations"]:
                found.setdefault(int(annotation["image_id"]), []).append(text(annotation, "caption"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        expected = f"COCO's 'annotations' or TextVQA's 'data': {error!r}"
        advice = "put the file there, or a list of accepted answers into every test row"
        raise DataError(f"cannot read the captions or answers {path}: expected {expected}; {advice}") from error
    return {item: tuple(accepted) for item, accepted in found.items()}


class _References:
    """A task's file of references, which is read when the first row needs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int | str, tuple[str, ...]] | None = None

    def add_to(self, row: Row, number: int) -> None:
        """Gives the row of that number, from 1, its accepted answers.

        Raises:
            DataError: the file cannot be read, and the row has no list of answers of its own.
            ValueError: it is TextVQA's, and has no answers to this question.
        """
        if isinstance(row.get("answer"), list) and not self.path.exists():
            return
        if self.known is None:
            self.known = read_captions(self.path)
        question = str(row.get("question_id"))
        if found := self.known.get(question) or self.known.get(number):
            row["answer"] = [*found]
            row.pop("answers", None)
        elif any(isinstance(item, str) for item in self.known):
            raise ValueError(f"'question_id' must be one of those in {self.path}, got {question}")


def scan(
    task: Task, data: Path, split: str, advance: Callable[[int], None] | None = None
) -> Generator[Line, None, None]:
    """Yields every row of a task's files of one split, malformed rows included; images are not checked.

    A file is open until the generator ends: close it where the rows are not all read.

    Args:
        advance: called with the number of bytes read.

    Raises:
        UserError: an unknown format.
        DataError: no such split, or no files.
    """
    pattern = getattr(task, split)
    reader = READERS.named(task.format, task.folder, f"format of task {task.name}")
    if not pattern:
        raise DataError(f"task {task.name} has no {split} split")
    root = data / task.image_folder(split)
    references = _References(data / task.references) if task.references and split == "test" else None
    further = [name for name in task.reads if name not in Suite.modalities]
    number = 0
    for path in files(data, pattern):
        with closing(rows(path, advance)) as lines:
            for origin, row in lines:
                try:
                    if isinstance(row, ValueError):
                        raise row
                    if references:
                        references.add_to(row, number + 1)
                    name = str(row.get("question_id", row.get("id", f"{task.name}-{split}-{number:06d}")))
                    media = {key: _file(row, key, root) for key in further}
                    sample = reader({key: row[key] for key in row.keys() - media}, root, name, origin)
                    sample = _with_category(replace(sample, media=media), row)
                    if split != "train" and len(sample.turns) > 1:
                        raise ValueError(f"asks {len(sample.turns)} questions; in a test each must be a row of its own")
                    yield Line(origin, row, _with_image_position(_with_prompts(sample, task, split), task, split), "")
                except DataError:
                    raise
                except ValueError as error:
                    yield Line(origin, {}, None, f"{error!s:.1000}")  # which may repeat the row
                number += 1


def _file(row: Row, name: str, root: Path) -> Path:
    """The file of a further modality, named or held by a row."""
    value = row.get(name)
    return inside(value if isinstance(value, ImageBytes) else text(row, name), root, name)


def _with_category(sample: Sample, row: Row) -> Sample:
    """The sample with the row's "answer_type"; files of other tasks mean other things by it, which nothing reads."""
    category = row.get("answer_type")
    return replace(sample, category=category) if isinstance(category, str) else sample


def _with_prompts(sample: Sample, task: Task, split: str) -> Sample:
    """The sample with the task's prompts and what it asks for; only tasks that write images have different prompts."""
    first, *more = sample.turns
    sample = replace(sample, asks_image=tuple(task.writes) == ("image",))
    if task.prompts == "consistent" and "image" in task.writes:
        first = replace(first, instruction=DRAW + caption_of(first.instruction))
        return replace(sample, turns=(first, *more))
    if task.test_prefix and split != "train":
        return replace(sample, prompt=task.test_prefix + first.instruction)
    return sample


def _with_image_position(sample: Sample, task: Task, split: str) -> Sample:
    """The sample with its image before or after the first instruction."""
    if task.image_position == "first" or split != "train":
        return sample
    digest = hashlib.sha256(f"{task.name}/{sample.id}".encode()).digest()
    return replace(sample, image_first=bool(digest[0] & 1))


def redrawn(sample: Sample, task: Task) -> Sample:
    """A training sample whose draws are to be made anew in every epoch."""
    place = task.image_position == "random" and sample.image is not None
    phrase = sample.target_image is not None and sample.draw is not None and not sample.turns[0].answer
    drawn = (("image_first", place), ("phrase", phrase))
    return replace(sample, redraws=tuple(name for name, is_drawn in drawn if is_drawn))


def left_out(sample: Sample, task: Task, split: str) -> str:
    """Why the task's image filter leaves out a sample, or ""; test samples are never left out."""
    if task.image_filter == "none" or split != "train" or sample.image is None:
        return ""
    return f"{sample.image} is {size}" if (size := unfit(sample.image)) else ""


def row_problem(
    line: Line, looked: dict[str, Inspection], need: ImageNeed, check: Callable[[Sample], Flaw | None] | None
) -> Problem | None:
    """What keeps a row from being used, or None.

    Args:
        looked: what is known of images so far, by path, which is added to.
        need: of the backbone that will read the images.
        check: of references, None in training.
    """
    if line.sample is None:
        return Problem(MALFORMED, line.problem)
    for image in line.sample.images:
        found = looked.get(str(image)) or looked.setdefault(str(image), inspect(image, decode=False))
        if found.fault:
            reason = MISSING if found.fault == "missing" else BROKEN
            return Problem(reason, f"names an image that is {found.fault}: {image}")
        if image == line.sample.image and (why := need(found.size)):
            size = f"{found.size[0]} x {found.size[1]} pixels"
            return Problem(UNFIT, f"names an image that cannot be read: {image}, {size}, {why}")
    if missing := missing_media(line.sample):
        return Problem(MISSING_FILE, missing)
    flaw = check(line.sample) if check else None
    return Problem(REFERENCE, flaw.text) if flaw and not flaw.usable else None


def missing_media(sample: Sample) -> str:
    """Which of a sample's files of further modalities is missing, or ""."""
    missing = [f"names a file of {name} that is missing: {path}" for name, path in sample.media.items()]
    return next((line for line, path in zip(missing, sample.media.values(), strict=True) if not path.is_file()), "")


def read_samples(
    task: Task,
    data: Path,
    split: str,
    limit: int = 0,
    need: ImageNeed = any_size,
    skip: bool = False,
    left: LeftOut | None = None,
) -> list[Sample]:
    """Reads a task's samples of one split, without those that its image filter leaves out.

    Args:
        data: the data folder.
        split: "train", "test", "validation" or "reworded".
        limit: most samples; 0: all.
        need: of the backbone that will read the images.
        skip: whether rows that cannot be used are left out, and not refused.
        left: gets the rows that are left out.

    Raises:
        DataError: naming every line of all files that is malformed, names an image or another file that is missing,
            broken or outside the image folder or unfit for the backbone, or has a reference that the task's scorer
            cannot use; or there are no samples.
        UserError: the task's scorer, which is not cnext's, fails with references as answers.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    looked: dict[str, Inspection] = {}
    left = LeftOut() if left is None else left
    check = None if split == "train" else reference_check(task)
    with closing(scan(task, data, split)) as lines:
        for line in lines:
            if limit and len(samples) >= limit:
                break
            problem = row_problem(line, looked, need, check)
            if problem and skip:
                left.add(task.name, split, problem.reason, f"{line.origin}: {problem.text}")
            elif problem or line.sample is None:
                problems.append(f"{line.origin}: {problem.text if problem else line.problem}")
            elif why := left_out(line.sample, task, split):
                left.add(task.name, split, RELEASED_SIZE, f"{line.origin}: {why}")
            else:
                samples.append(line.sample)
    if problems:
        raise UnusableRows("\n".join([f"task {task.name}: {len(problems)} unusable rows", *problems]))
    if not samples:
        raise nothing_left(task, split, data / getattr(task, split), left)
    if "image" in task.reads and not any(sample.image for sample in samples):
        raise DataError(no_image(task, data, split, len(samples)))
    if split != "train":
        try_scorer(task, samples[:TRIED])
    return samples


def nothing_left(task: Task, split: str, place: Path, left: LeftOut) -> DataError:
    """The error for a split without samples: how many rows are left out and why, and the first row of each reason."""
    found = f"task {task.name}: no {split} samples in {place}"
    reasons = left.rows.get(task.name, {}).get(split, {})
    return DataError(
        "\n".join(
            [f"{found}; {left.summary(task.name, split)}" if reasons else found, *(r[0] for r in reasons.values())]
        )
    )


def no_image(task: Task, data: Path, split: str, count: int) -> str:
    """What is wrong with a task that reads images, where none of the rows of a split names one."""
    place = data / getattr(task, split)
    return f"task {task.name} reads images, and none of its {count} rows in {place} names one"


def usable_flaws(task: Task, samples: list[Sample]) -> str:
    """A line on the test samples whose references have a flaw that `read_samples` lets pass; "" if there are none."""
    check = reference_check(task)
    found = [f"{sample.origin}: {flaw.text}" for sample in samples if (flaw := check(sample))]
    return f"warning: {task.name}: {len(found)} of {len(samples)} references: {listed(found, 3)}" if found else ""
