"""Reading a task's files: every row checked, and every problem named at once, before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cnext.errors import parse_json, unknown
from cnext.tasks.base import DataError, Sample, Task, caption_of
from cnext.tasks.images import fault, unfit
from cnext.tasks.readers import READERS
from cnext.tasks.rows import Row, files, rows, text

DRAW = "Please generate the image: "
"""How instructions to draw begin in the released test files, and everywhere with consistent prompts."""


class Line(NamedTuple):
    """One row of a file: its fields and the sample that they make, or what is wrong with it."""

    origin: str
    row: Row
    sample: Sample | None
    problem: str


def captions(path: Path) -> dict[int, tuple[str, ...]]:
    """Several captions per item from a file as COCO writes it: {"annotations": [{"image_id", "caption"}, ...]}."""
    try:
        listed = parse_json(path.read_bytes())["annotations"]
        found: dict[int, list[str]] = {}
        for annotation in listed:
            found.setdefault(int(annotation["image_id"]), []).append(text(annotation, "caption"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"cannot read the captions {path}: expected COCO's 'annotations': {error!r}") from error
    return {item: tuple(accepted) for item, accepted in found.items()}


def scan(task: Task, data: Path, split: str, advance: Callable[[int], None] | None = None) -> Iterator[Line]:
    """Every row of a task's files of one split, good or not; the images that it names are not looked at.

    Args: advance: told the bytes read.
    """
    pattern = getattr(task, split)
    if task.format not in READERS:
        raise unknown(f"format of task {task.name}", task.format, list(READERS))
    reader = READERS[task.format]
    if not pattern:
        raise DataError(f"task {task.name} has no {split} split")
    root = data / task.image_folder(split)
    several = captions(data / task.references) if task.references and split == "test" else {}
    number = 0
    for path in files(data, pattern):
        for origin, row in rows(path, advance):
            try:
                if isinstance(row, ValueError):
                    raise row
                if several and number + 1 in several:
                    row["answer"] = [*several[number + 1]]
                name = str(row.get("question_id", row.get("id", f"{task.name}-{split}-{number:06d}")))
                sample = reader(row, root, name, origin)
                yield Line(origin, row, _placed(_worded(sample, task, split), task, split), "")
            except ValueError as error:
                yield Line(origin, {}, None, str(error))
            number += 1


def _worded(sample: Sample, task: Task, split: str) -> Sample:
    """The sample with the task's prompts; only tasks that write images have more than one wording."""
    first, *more = sample.turns
    if task.prompts == "consistent" and "image" in task.writes:
        first = replace(first, instruction=DRAW + caption_of(first.instruction))
        return replace(sample, turns=(first, *more))
    if task.test_prefix and split != "train":
        return replace(sample, prompt=task.test_prefix + first.instruction)
    return sample


def _placed(sample: Sample, task: Task, split: str) -> Sample:
    """The sample with its image before or after the first instruction."""
    if task.image_position == "first" or split != "train":
        return sample
    digest = hashlib.sha256(f"{task.name}/{sample.id}".encode()).digest()
    return replace(sample, image_first=bool(digest[0] & 1))


def left_out(sample: Sample, task: Task, split: str) -> str:
    """Which images of a sample the task's image filter refuses, or "". Every test sample stays."""
    if task.image_filter == "none" or split != "train":
        return ""
    return ", ".join(f"{image} is {size}" for image in sample.images if (size := unfit(image)))


def read(task: Task, data: Path, split: str, limit: int = 0) -> list[Sample]:
    """A task's samples of one split: "train", "test" or "validation"; at most ``limit`` of them (0 = all).

    Without those that the task's image filter leaves out; `cnext data check` counts them.

    Raises DataError naming, for all files at once, every line that is malformed or names a missing or broken image
    or one outside the image folder.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    faults: dict[Path, str] = {}
    for line in scan(task, data, split):
        if limit and len(samples) >= limit:
            break
        problem = line.problem
        for image in line.sample.images if line.sample else ():
            if image not in faults:
                faults[image] = fault(image)
            problem = f"names an image that is {faults[image]}: {image}" if faults[image] else problem
        if problem or line.sample is None:
            problems.append(f"{line.origin}: {problem}")
        elif not left_out(line.sample, task, split):
            samples.append(line.sample)
    if problems:
        raise DataError("\n".join([f"task {task.name}: {len(problems)} unusable rows", *problems]))
    place = data / getattr(task, split)
    if not samples:
        why = " that its image filter leaves in" if task.image_filter != "none" and split == "train" else ""
        raise DataError(f"task {task.name}: no {split} samples in {place}{why}")
    if "image" in task.reads and not any(sample.image for sample in samples):
        raise DataError(f"task {task.name} reads images, and none of its {len(samples)} rows in {place} names one")
    return samples
