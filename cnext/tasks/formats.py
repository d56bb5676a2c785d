"""Readers of the benchmark's files: train JSONL and test JSON of the three formats, checked before anything runs.

conversation   {"image", "data": [question, answer, ...]}  |  {"question_id", "image", "text", "answer"/"answer_bbox"}
generation     {"image", "data": ["Please generate the image.", caption]}  |  {"question_id", "text"[, "image"]}
editing        {"source_image", "target_image", "instruction"}  (both files)

Keys with spaces ("question id", "source image") are read as the same keys with underscores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnext.tasks.base import DataError, Sample, Task, Turn

Row = dict[str, Any]


def _text(row: Row, name: str) -> str:
    if name not in row:
        raise ValueError(f"lacks the key {name!r}; it has: {', '.join(sorted(row)) or 'none'}")
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} must be a string, got {type(row[name]).__name__}")
    return row[name]


def _image(row: Row, name: str, root: Path) -> Path:
    relative = _text(row, name)
    # Compared as text and not resolved, so that a link inside the root may point to a disk that holds the pictures.
    normal = os.path.normpath(relative)
    if os.path.isabs(relative) or normal == ".." or normal.startswith(f"..{os.sep}"):
        raise ValueError(f"{name!r} leaves the image folder {root}: {relative}")
    path = root / normal
    if not path.is_file():
        raise ValueError(f"{name!r} names a missing image: {path}")
    return path


def _turns(row: Row) -> tuple[Turn, ...]:
    data = row.get("data")
    if not isinstance(data, list) or not data or len(data) % 2 or not all(isinstance(text, str) for text in data):
        raise ValueError("'data' must be a list of an even number of strings: question, answer, question, answer, ...")
    return tuple(Turn(question, answer) for question, answer in zip(data[::2], data[1::2], strict=True))


def _size(row: Row) -> tuple[int, int] | None:
    size = row.get("size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError(f"'size' must be [width, height] in pixels, got {size!r}")
    return (size[0], size[1])


def conversation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A question about an image, or several in a row."""
    image = _image(row, "image", root)
    if "data" in row:
        return Sample(name, _turns(row), image, origin=origin)
    answer = _text(row, "answer_bbox" if "answer_bbox" in row else "answer")
    return Sample(name, (Turn(_text(row, "text"), answer),), image, size=_size(row), origin=origin)


def generation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A caption to draw. In a test file the image is optional: it is shown in the report and never scored against."""
    if "data" in row:
        (turn, *more) = _turns(row)
        if more:
            raise ValueError("'data' of a picture to draw must be one pair: instruction and caption")
        return Sample(
            name, (Turn(f"{turn.instruction} {turn.answer}"),), None, _image(row, "image", root), origin=origin
        )
    target = _image(row, "image", root) if "image" in row else None
    return Sample(name, (Turn(_text(row, "text")),), None, target, origin=origin)


def editing(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A picture and an instruction to change it by."""
    instruction = _text(row, "instruction_new" if "instruction_new" in row else "instruction")
    source, target = _image(row, "source_image", root), _image(row, "target_image", root)
    return Sample(name, (Turn(instruction),), source, target, origin=origin)


READERS: dict[str, Callable[[Row, Path, str, str], Sample]] = {
    "conversation": conversation,
    "generation": generation,
    "editing": editing,
}


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, parsed row or the error met) for every row of a JSONL or JSON file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield str(path), ValueError(f"is not UTF-8 text ({error.reason} at byte {error.start})")
        return
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    yield f"{path}:{number}", ValueError(f"is not JSON: {error.msg} at column {error.colno}")
                except RecursionError:
                    yield f"{path}:{number}", ValueError("is not a flat JSON object: it is nested too deeply")
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        yield f"{path}:{error.lineno}", ValueError(f"is not JSON: {error.msg} at column {error.colno}")
        return
    except RecursionError:
        yield str(path), ValueError("is not a list of flat JSON objects: it is nested too deeply")
        return
    if not isinstance(rows, list):
        yield str(path), ValueError(f"must hold one JSON list, got {type(rows).__name__}")
        return
    for index, row in enumerate(rows):
        yield f"{path}#{index}", row


def _files(data: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in data.glob(pattern) if path.is_file())
    if not files:
        raise DataError(f"no file matches {data / pattern}; expected the benchmark's layout below {data}")
    return files


def _opens(path: Path) -> None:
    """Raises ValueError where an image cannot be read whole."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"names a broken image: {path} ({error})") from error


def read(task: Task, data: Path, split: str, limit: int = 0) -> list[Sample]:
    """A task's samples of one split: "train", "test" or "validation"; at most ``limit`` of them (0 = all).

    Raises DataError naming, for all files at once, every line that is malformed or names a missing or broken image
    or one outside the image folder.
    """
    pattern = getattr(task, split)
    if not pattern:
        raise DataError(f"task {task.name} has no {split} split")
    root = data / (task.train_images if split == "train" else task.test_images)
    samples: list[Sample] = []
    problems: list[str] = []
    opened: set[Path] = set()
    for path in _files(data, pattern):
        for origin, row in _rows(path):
            if limit and len(samples) >= limit:
                break
            try:
                if isinstance(row, ValueError):
                    raise row
                if not isinstance(row, dict):
                    raise ValueError(f"must be a JSON object, got {type(row).__name__}")
                row = {key.replace(" ", "_"): value for key, value in row.items()}
                name = str(row.get("question_id", f"{task.name}-{split}-{len(samples) + len(problems):06d}"))
                sample = READERS[task.format](row, root, name, origin)
                for image in {sample.image, sample.target_image} - opened - {None}:
                    _opens(image)
                    opened.add(image)
                samples.append(sample)
            except ValueError as error:
                problems.append(f"{origin}: {error}")
    if problems:
        raise DataError("\n".join([f"task {task.name}: {len(problems)} unusable rows", *problems]))
    if not samples:
        raise DataError(f"task {task.name}: no {split} samples in {data / pattern}")
    return samples
