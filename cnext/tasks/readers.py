"""What a row of each format says: row to Sample, without looking at the image files that it names.

conversation   {"image", "data": [question, answer, ...]}  |  {"question_id", "image", "text", "answer"/"answer_bbox"}
generation     {"image", "data": ["Please generate the image.", caption]}  |  {"question_id", "text"[, "image"]}
editing        {"source_image", "target_image", "instruction"[, "instruction_new", "response"]}
llava          {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}  |  a conversation test row
messages       {"messages": [{"role": "user" | "assistant", "content"}, ...], "images": [path, ...]}

"answer" may be a list of accepted answers. A row without "image", or with null, "", "none" or a name with "null" in it,
is a sample of text alone, as released.
``<image>`` in llava and messages stands where the image does: before the question, or after it. In messages an
``<image>`` of the assistant is a picture to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnext.registry import Registry
from cnext.tasks.base import Sample, Turn
from cnext.tasks.rows import Row, answers, image, inside, optional_image, text

MARK = "<image>"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _turns(row: Row) -> tuple[Turn, ...]:
    data = row.get("data")
    if not isinstance(data, list) or not data or len(data) % 2 or not all(isinstance(said, str) for said in data):
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
    read = optional_image(row, "image", root)
    if "data" in row:
        return Sample(name, _turns(row), read, origin=origin)
    accepted = answers(row, "answer_bbox" if "answer_bbox" in row else "answer")
    turns = (Turn(text(row, "text"), accepted[0]),)
    several = accepted if len(accepted) > 1 else ()
    return Sample(name, turns, read, size=_size(row), origin=origin, references=several)


def generation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A caption to draw. In a test file the image is optional: it is shown in the report and never scored against."""
    if "data" in row:
        (turn, *more) = _turns(row)
        if more:
            raise ValueError("'data' of a picture to draw must be one pair: instruction and caption")
        target = image(row, "image", root)
        return Sample(name, (Turn(f"{turn.instruction} {turn.answer}"),), None, target, origin=origin)
    return Sample(name, (Turn(text(row, "text")),), None, optional_image(row, "image", root), origin=origin)


def editing(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A picture and an instruction to change it by."""
    instruction = text(row, "instruction_new" if "instruction_new" in row else "instruction")
    response = text(row, "response") if "response" in row else ""
    source, target = image(row, "source_image", root), image(row, "target_image", root)
    return Sample(name, (Turn(instruction, response),), source, target, origin=origin, tiled=False)


def llava(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation as LLaVA writes it."""
    if "conversations" not in row:
        return conversation(row, root, name, origin)
    said = _said(row, "conversations", "from", "value")
    read = optional_image(row, "image", root)
    return _chat(said, [] if read is None else [read], name, origin)


def messages(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation as chat templates write it, with its images in a list in the order of their ``<image>``."""
    images = row.get("images") or []
    if not (isinstance(images, list) and all(isinstance(path, str) for path in images)):
        raise ValueError("'images' must be a list of paths")
    said = _said(row, "messages", "role", "content")
    return _chat(said, [inside(path, root, "images") for path in images], name, origin)


def _words(value: Any) -> str:
    """A message's text: a string, or a list of parts {"type": "text", "text"} and {"type": "image"}."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(MARK if part.get("type") == "image" else text(part, "text") for part in value)
    raise ValueError(f"a message must be a string or a list of parts, got {type(value).__name__}")


def _said(row: Row, key: str, speaker: str, words: str) -> list[tuple[str, str]]:
    """(speaker, text) of every message, a leading one of the system put before the first question."""
    listed = row.get(key)
    if not (isinstance(listed, list) and listed and all(isinstance(message, dict) for message in listed)):
        raise ValueError(f"lacks {key!r}, a list of objects with {speaker!r} and {words!r}")
    told = [message.get(speaker) for message in listed]
    strange = sorted({repr(who) for who in told if not isinstance(who, str) or who not in SPEAKERS})
    if strange:
        raise ValueError(f"{speaker!r} must be one of {', '.join(SPEAKERS)}, got {', '.join(strange)}")
    said = [(SPEAKERS[message[speaker]], _words(message.get(words))) for message in listed]
    if said[0][0] == "system" and len(said) > 1:
        said[:2] = [(said[1][0], f"{said[0][1]}\n{said[1][1]}")]
    if [who for who, _ in said] != ["user", "assistant"] * (len(said) // 2):
        raise ValueError(f"{key!r} must alternate question, answer, question, answer, ...: got {_order(said)}")
    return said


def _order(said: Sequence[tuple[str, str]]) -> str:
    return ", ".join(who for who, _ in said)


def _chat(said: list[tuple[str, str]], images: list[Path], name: str, origin: str) -> Sample:
    places = [place for place, (_, words) in enumerate(said) for _ in range(words.count(MARK))]
    if not places and len(images) == 1:
        places = [0]
    if len(places) != len(images):
        raise ValueError(f"has {len(places)} {MARK} for {len(images)} images")
    if len(set(places)) < len(places) or any(place > 1 for place in places):
        raise ValueError(f"has {len(images)} images; the first question may read one, and the first answer write one")
    shown = dict(zip(places, images, strict=True))
    bare = [words.replace(MARK, "").strip() for _, words in said]
    turns = tuple(Turn(question, answer) for question, answer in zip(bare[::2], bare[1::2], strict=True))
    sample = Sample(name, turns, shown.get(0), shown.get(1), origin=origin)
    first = not said[0][1].strip().endswith(MARK) or bare[0] == ""
    return replace(sample, image_first=first, tiled=sample.target_image is None)


READERS = Registry(
    "format",
    "cnext.readers",
    {name: f"{__name__}:{name}" for name in ("conversation", "generation", "editing", "llava", "messages")},
)
"""Readers by format: functions (row, image folder, sample id, origin) to `Sample`, which raise ValueError for a bad
row."""
