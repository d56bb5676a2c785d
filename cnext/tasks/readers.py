"""Readers of file formats: convert a row to a `Sample`, without checking the image files that it names.

conversation   {"image", "data": [question, answer, ...]}  |  {"question_id", "image", "text", "answer"/"answer_bbox"}
generation     {"image", "data": ["Please generate the image.", caption]}  |  {"question_id", "text"[, "image"]}
editing        {"source_image", "target_image", "instruction"[, "instruction_new", "response"]}
llava          {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}  |  a conversation test row
messages       {"messages": [{"role": "user" | "assistant", "content"}, ...], "images": [path, ...]}

"answer" may be a list of accepted answers. A row without "image", or with null, "", "none" or a name that contains
"null", is a text-only sample, as released.
``<image>`` in llava and messages gives the position of the image: before the question, or after it. In messages, an
``<image>`` of the assistant is an image to write.

Another package adds a format by an entry point of the group ``cnext.readers``: ``name = "module:reader"``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cnext.registry import Registry
from cnext.tasks.base import Sample, Turn
from cnext.tasks.rows import Row, answers, image, inside, optional_image, text

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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
    """A question about an image, or a conversation of several."""
    read = optional_image(row, "image", root)
    if "data" in row:
        return Sample(name, _turns(row), read, origin=origin)
    accepted = answers(row, "answer_bbox" if "answer_bbox" in row else "answer")
    turns = (Turn(text(row, "text"), accepted[0]),)
    several = accepted if len(accepted) > 1 else ()
    return Sample(name, turns, read, size=_size(row), origin=origin, references=several)


def generation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A caption of an image to write. In a test file the image is optional, and is only shown in the report."""
    if "data" in row:
        (turn, *more) = _turns(row)
        if more:
            raise ValueError("'data' of an image to write must be one pair: instruction and caption")
        target = image(row, "image", root)
        return Sample(name, (Turn(f"{turn.instruction} {turn.answer}"),), None, target, origin=origin)
    return Sample(name, (Turn(text(row, "text")),), None, optional_image(row, "image", root), origin=origin)


def editing(row: Row, root: Path, name: str, origin: str) -> Sample:
    """An image and an instruction to edit it."""
    instruction = text(row, "instruction_new" if "instruction_new" in row else "instruction")
    response = text(row, "response") if "response" in row else ""
    source, target = image(row, "source_image", root), image(row, "target_image", root)
    return Sample(name, (Turn(instruction, response),), source, target, origin=origin, tiled=False)


def llava(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation in LLaVA's format."""
    if "conversations" not in row:
        return conversation(row, root, name, origin)
    messages = _messages(row, "conversations", "from", "value")
    read = optional_image(row, "image", root)
    return _chat(messages, [] if read is None else [read], name, origin)


def messages(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation as chat templates take it, with a list of images in the order of their ``<image>``."""
    images = row.get("images") or []
    if not (isinstance(images, list) and all(isinstance(path, str) for path in images)):
        raise ValueError("'images' must be a list of paths")
    return _chat(
        _messages(row, "messages", "role", "content"), [inside(path, root, "images") for path in images], name, origin
    )


def _message_text(value: Any) -> str:
    """A message's text: a string, or a list of parts {"type": "text", "text"} and {"type": "image"}."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(MARK if part.get("type") == "image" else text(part, "text") for part in value)
    raise ValueError(f"a message must be a string or a list of parts, got {type(value).__name__}")


def _messages(row: Row, key: str, role: str, content: str) -> list[tuple[str, str]]:
    """(role, text) of every message; a leading system message is prepended to the first question."""
    rows = row.get(key)
    if not (isinstance(rows, list) and rows and all(isinstance(message, dict) for message in rows)):
        raise ValueError(f"lacks {key!r}, a list of objects with {role!r} and {content!r}")
    roles = [message.get(role) for message in rows]
    if unknown := sorted({repr(one) for one in roles if not isinstance(one, str) or one not in ROLES}):
        raise ValueError(f"{role!r} must be one of {', '.join(ROLES)}, got {', '.join(unknown)}")
    found = [(ROLES[message[role]], _message_text(message.get(content))) for message in rows]
    if found[0][0] == "system" and len(found) > 1:
        found[:2] = [(found[1][0], f"{found[0][1]}\n{found[1][1]}")]
    order = [one for one, _ in found]
    if order != ["user", "assistant"] * (len(found) // 2):
        raise ValueError(f"{key!r} must alternate question, answer, question, answer, ...: got {', '.join(order)}")
    return found


def _chat(messages: list[tuple[str, str]], images: list[Path], name: str, origin: str) -> Sample:
    places = [index for index, (_, text) in enumerate(messages) for _ in range(text.count(MARK))]
    if not places and len(images) == 1:
        places = [0]
    if len(places) != len(images):
        raise ValueError(f"has {len(places)} {MARK} for {len(images)} images")
    if len(set(places)) < len(places) or any(index > 1 for index in places):
        raise ValueError(f"has {len(images)} images; the first question may read one, and the first answer write one")
    shown = dict(zip(places, images, strict=True))
    bare = [text.replace(MARK, "").strip() for _, text in messages]
    turns = tuple(Turn(question, answer) for question, answer in zip(bare[::2], bare[1::2], strict=True))
    sample = Sample(name, turns, shown.get(0), shown.get(1), origin=origin)
    first = not messages[0][1].strip().endswith(MARK) or bare[0] == ""
    return replace(sample, image_first=first, tiled=sample.target_image is None)


READERS = Registry(
    "format",
    "cnext.readers",
    {name: f"{__name__}:{name}" for name in ("conversation", "generation", "editing", "llava", "messages")},
)
"""Readers by format: functions (row, image folder, sample id, origin) to `Sample`, which raise ValueError for a bad
row."""
