"""Readers of file formats: convert a row to a `Sample`, without checking the image files that it names.

conversation   {"image", "data": [question, answer, ...]}  |  {"question_id", "image", "text", "answer"/"answer_bbox"}
               "question" is "text", and "answers" is "answer"
generation     {"image", "data": ["Please generate the image.", caption]}  |  {"question_id", "text"[, "image"]}
editing        {"source_image", "target_image", "instruction"[, "instruction_new", "response"]}
               as editing_as_released by the keys that the paper's code takes
llava          {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}  |  a conversation test row
messages       {"messages": [{"role": "user" | "assistant", "content"}, ...], "images": [path, ...]}

conversation, llava and messages also read {"instruction", "input", "output"[, "history", "images"]}, and a "system"
beside the conversation. "answer" may be a list of accepted answers. ``cnext.tasks.row_images`` says how an image is
named. A row that names none, or names null, "", "none", "null" or a file null.* that is not there, is text alone.
``<image>`` gives the position of the image: before the question, or after it; in an answer it is an image to write.
An answer before the first question is left out, as LLaVA does.

Another package adds a format by an entry point of the group ``cnext.readers``: ``name = "module:reader"``; a suite of
one's own names one as ``"format": "module:function"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.registry import Registry
from cnext.tasks.base import Sample, Turn
from cnext.tasks.kept_images import ImageBytes
from cnext.tasks.row_images import MARK, field_image, named, named_one, placed, refuse_others, slots, tag, without_slots
from cnext.tasks.rows import Row, answers, text

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_TRAINING_MARKS = ("loss", "weight", "train", "trainable", "loss_weight", "train_on_turn")
_CALLS = ("tool_calls", "function_call")
Message = tuple[str, str]


def _turns(row: Row) -> tuple[Turn, ...]:
    data = row.get("data")
    if not isinstance(data, list) or not data or len(data) % 2 or not all(isinstance(text, str) for text in data):
        raise ValueError("'data' must be a list of an even number of strings: question, answer, question, answer, ...")
    return tuple(Turn(question, answer) for question, answer in zip(data[::2], data[1::2], strict=True))


def _size(row: Row) -> tuple[int, int] | None:
    size = row.get("size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(_whole(side) and side > 0 for side in size)):
        raise ValueError(f"'size' must be [width, height] in pixels, got {size!r}")
    return (int(size[0]), int(size[1]))


def _whole(value: Any) -> bool:
    """Whether a value of JSON is a whole number."""
    return type(value) is int or (type(value) is float and value.is_integer())


def conversation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A question about an image, or a conversation of several."""
    if "data" in row:
        turns = _turns(row)
        said = [message for turn in turns for message in (("user", turn.instruction), ("assistant", turn.answer))]
        return _chat(row, said, root, name, origin)
    if _is_instruction(row):
        return _chat(row, _instruction(row), root, name, origin)
    _refuse_both(row, "answer", "answers")
    _refuse_both(row, "text", "question")
    accepted = answers(row, next((key for key in ("answer_bbox", "answer", "answers") if key in row), "answer"))
    asked = text(row, "question" if "question" in row and "text" not in row else "text")
    sample = _chat(row, [("user", asked), ("assistant", "")], root, name, origin)
    turn = Turn(sample.turns[0].instruction, accepted[0])
    several = accepted if len(accepted) > 1 else ()
    return replace(sample, turns=(turn,), size=_size(row), references=several)


def _refuse_both(row: Row, key: str, other: str) -> None:
    """Raises ValueError where a row has two keys of one meaning that differ."""
    one, two = ([value] if not isinstance(value := row.get(name), list) else value for name in (key, other))
    if row.get(key) is not None and row.get(other) is not None and one != two:
        raise ValueError(f"has {key!r} and {other!r}, which differ; keep one")


def generation(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A caption of an image to write. In a test file the image is optional, and is only shown in the report."""
    _refuse_systems(row, ("system", "system_prompt"))
    if "data" in row:
        (turn, *more) = _turns(row)
        if more:
            raise ValueError("'data' of an image to write must be one pair: instruction and caption")
        caption, target = f"{turn.instruction} {turn.answer}", named_one(row, root, needed=True)
    else:
        caption, target = text(row, "text"), named_one(row, root)
    if slots([caption], root):
        raise ValueError(f"has {MARK} in the caption of an image to write, which reads none")
    return Sample(name, (Turn(caption),), None, target, origin=origin)


def editing(row: Row, root: Path, name: str, origin: str) -> Sample:
    """An image and an instruction to edit it: "instruction_new" if there is one, and the "response" to it."""
    instruction = text(row, "instruction_new" if row.get("instruction_new") is not None else "instruction")
    return _edit(row, root, name, origin, instruction, text(row, "response") if row.get("response") is not None else "")


def editing_as_released(row: Row, root: Path, name: str, origin: str) -> Sample:
    """An image and an instruction to edit it, by the keys that the paper's code takes.

    "instruction" comes before "instruction_new", and a "response" beside it is not read. That of "instruction_new" is
    the phrase before the image even if it is empty.
    """
    if row.get("instruction") is not None or row.get("instruction_new") is None:
        return _edit(row, root, name, origin, text(row, "instruction"), "")
    asked, answered = text(row, "instruction_new"), row.get("response") is not None
    sample = _edit(row, root, name, origin, asked, text(row, "response") if answered else "")
    return replace(sample, draw=None) if answered else sample


def _edit(row: Row, root: Path, name: str, origin: str, instruction: str, response: str) -> Sample:
    _refuse_systems(row, ("system", "system_prompt"))
    source, target = field_image(row, "source_image", root), field_image(row, "target_image", root)
    refuse_others(row, [source, target], row, root)
    placed([instruction], [source], root)
    placed([response], [target], root)
    bare, first = without_slots(instruction)
    return Sample(
        name, (Turn(bare, without_slots(response)[0]),), source, target, origin=origin, image_first=first, tiled=False
    )


def llava(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation in LLaVA's format."""
    if "conversations" not in row:
        return conversation(row, root, name, origin)
    return _chat(row, _messages(row, "conversations", "from", "value", root), root, name, origin)


def messages(row: Row, root: Path, name: str, origin: str) -> Sample:
    """A conversation as chat templates take it, with a list of images in the order of their ``<image>``."""
    if "messages" not in row and _is_instruction(row):
        return conversation(row, root, name, origin)
    said = _messages(row, "messages", "role", "content", root)
    return _chat(row, said, root, name, origin, _bytes_of_parts(row["messages"]))


def _bytes_of_parts(said: list[Row]) -> list[ImageBytes]:
    """The images that parts of messages hold as bytes, in order."""
    parts = [part for one in said if isinstance(one.get("content"), list) for part in one["content"]]
    return [value for part in parts for value in part.values() if isinstance(value, ImageBytes)]


def _is_instruction(row: Row) -> bool:
    return "instruction" in row and "output" in row


def _instruction(row: Row) -> list[Message]:
    """The messages of a row in Alpaca's format."""
    pairs = row.get("history") or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise ValueError("'history' must be a list of pairs: question, answer")
    asked = [text(row, "instruction"), text(row, "input") if row.get("input") else ""]
    said = [message for pair in pairs for message in pair] + ["\n".join(filter(None, asked)), text(row, "output")]
    if not all(isinstance(message, str) for message in said):
        raise ValueError("'history' must be a list of pairs of strings: question, answer")
    return list(zip(["user", "assistant"] * (len(said) // 2), said, strict=True))


def _message_text(value: Any) -> str:
    """A message's text: a string, or a list of parts as chat templates and OpenAI's servers take them."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(map(_part_text, value)).strip()
    raise ValueError(f"a message must be a string or a list of parts, got {type(value).__name__}")


def _part_text(part: dict[str, Any]) -> str:
    """A part's text; of an image its place, with the path if it has one."""
    kind = part.get("type") or next((key for key in ("text", "image", "image_url") if key in part), "text")
    if kind in ("text", "input_text"):
        return text(part, "text")
    if kind not in ("image", "image_url", "input_image"):
        raise ValueError(f"has a part of a message that is not read, of type {kind!r}; text and image are")
    values = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key)]
    if not values:
        if others := sorted(key for key, value in part.items() if key not in ("type", "detail") and value):
            raise ValueError(
                f"a part of type {kind!r} names no path, only {', '.join(others)}; save the image as a file"
            )
        return MARK
    found = [value.get("url") or value.get("path") if isinstance(value, dict) else value for value in values]
    if len(found) > 1 or not isinstance(found[0], str | ImageBytes):
        raise ValueError(f"a part of type {kind!r} must have one path")
    return MARK if isinstance(found[0], ImageBytes) else tag(found[0].strip())


def _messages(row: Row, key: str, role: str, content: str, root: Path) -> list[Message]:
    """(role, text) of every message."""
    rows = row.get(key)
    if not (isinstance(rows, list) and rows and all(isinstance(message, dict) for message in rows)):
        raise ValueError(f"lacks {key!r}, a list of objects with {role!r} and {content!r}")
    roles = [message.get(role) for message in rows]
    if unknown := sorted({repr(one) for one in roles if not isinstance(one, str) or one.lower() not in ROLES}):
        raise ValueError(f"{role!r} must be one of {', '.join(ROLES)}, got {', '.join(unknown)}")
    for message in rows:
        rest = {name: value for name, value in message.items() if name not in (role, content)}
        _refuse_message_keys(rest, ROLES[message[role].lower()], root)
    return [(ROLES[message[role].lower()], _message_text(message.get(content))) for message in rows]


def _refuse_message_keys(message: Row, speaker: str, root: Path) -> None:
    """Raises ValueError where a message has an image or a call beside its text, or is not to be trained on as others.

    message: without its role and text.
    """
    refuse_others(message, [], message, root, " of a message")
    for key in _CALLS:
        if message.get(key):
            raise ValueError(f"has a message with {key!r}, which is not read; leave the row out")
    for key in _TRAINING_MARKS:
        if speaker == "assistant" and message.get(key) not in (None, 1):
            what = f"has a message with {key!r}: {message[key]!r}, which is not read"
            raise ValueError(f"{what}: every answer is trained on alike; remove the key, or the message")


def _chat(
    row: Row, said: list[Message], root: Path, name: str, origin: str, parts: Sequence[ImageBytes] = ()
) -> Sample:
    """The sample of a conversation, with the images and the system that the row has beside it.

    parts: images in place of those beside it.
    """
    _refuse_systems(row, ("system_prompt",))
    system, texts = _alternating(_with_system(row, said), root)
    beside = named(row, root)
    if beside and parts:
        raise ValueError("has images in parts of its messages, and others beside them; keep one")
    shown = placed(texts, beside or [image.file() for image in parts], root)
    first = without_slots(texts[0])[1]
    bare = [without_slots(text)[0] for text in texts]
    bare[0] = f"{system}\n{bare[0]}" if system else bare[0]
    turns = tuple(Turn(question, answer) for question, answer in zip(bare[::2], bare[1::2], strict=True))
    return Sample(name, turns, shown.get(0), shown.get(1), origin=origin, image_first=first, tiled=shown.get(1) is None)


def _refuse_systems(row: Row, keys: tuple[str, ...]) -> None:
    """Raises ValueError where a row has a system under a key that its format does not read."""
    for key in keys:
        if row.get(key):
            advice = "name it 'system'" if keys == ("system_prompt",) else "write it into the instruction"
            raise ValueError(f"has {key!r}, which is not read; {advice}")


def _with_system(row: Row, said: list[Message]) -> list[Message]:
    """The messages, with the row's "system" as one of them."""
    if not row.get("system"):
        return said
    system = text(row, "system").strip()
    if said[0][0] == "system" and said[0][1] != system:
        raise ValueError("has a 'system' and another system message; keep one")
    return said if said[0][0] == "system" else [("system", system), *said]


def _alternating(said: list[Message], root: Path) -> tuple[str, list[str]]:
    """The system message that some messages begin with, or "", and question, answer, question, ..."""
    system, rest = (said[0][1], said[1:]) if said[0][0] == "system" and len(said) > 1 else ("", said)
    unasked = rest[0][0] == "assistant"
    if slots([system, rest[0][1] if unasked else ""], root):
        raise ValueError("begins with an answer or a system message that has an image, which is not read")
    rest = rest[unasked:]
    order = [one for one, _ in rest]
    if not rest or order != ["user", "assistant"] * (len(rest) // 2):
        given = ", ".join(one for one, _ in said)
        raise ValueError(f"must alternate question, answer, question, answer, ...: got {given}")
    return system, [text for _, text in rest]


Reader = Callable[[Row, Path, str, str], Sample]


def checked(reader: Reader) -> Reader:
    """A reader of another package or of a suite's folder, whose errors name the row as those of cnext's do."""
    if getattr(reader, "__module__", None) == __name__:
        return reader
    if not callable(reader):
        raise UserError(f"expected a function (row, image_folder, sample_id, origin) as a reader, got {reader!r}")
    called = getattr(reader, "__qualname__", type(reader).__name__)

    def read(row: Row, root: Path, name: str, origin: str) -> Sample:
        try:
            found = reader(row, root, name, origin)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"cannot be read: {called} raises {type(error).__name__}: {error}") from error
        if not isinstance(found, Sample):
            raise ValueError(f"cannot be read: {called} returns {type(found).__name__}, expected a Sample")
        if wrong := _wrong_types(found):
            raise ValueError(f"cannot be read: {called} returns a Sample with {wrong}")
        return found

    return read


def _wrong_types(sample: Sample) -> str:
    """The first field of a sample that has another type than its class says, and what it must be; "" if none has."""
    for name in ("turns", "references"):
        if not isinstance(found := getattr(sample, name), tuple):
            return f"{name} of type {type(found).__name__}, expected a tuple"
    if not sample.turns:
        return "no turns, expected at least one Turn"
    values: list[tuple[str, Any, type]] = [("turns", turn, Turn) for turn in sample.turns]
    for turn in (turn for turn in sample.turns if isinstance(turn, Turn)):
        values += [("a turn's instruction", turn.instruction, str), ("a turn's answer", turn.answer, str)]
    values += [("references", one, str) for one in sample.references]
    values += [(name, getattr(sample, name), str) for name in ("id", "origin", "prompt", "category")]
    paths = (("image", sample.image), ("target_image", sample.target_image))
    values += [(name, path, Path) for name, path in paths if path is not None]
    for name, value, expected in values:
        if not isinstance(value, expected):
            return f"{name} of type {type(value).__name__}: {value!r:.80}, expected {expected.__name__}"
    size: Any = sample.size
    if size is not None and not (isinstance(size, tuple) and len(size) == 2 and all(_whole(side) for side in size)):
        return f"size {size!r:.80}, expected a tuple of two whole numbers, or None"
    return ""


READERS = Registry(
    "format",
    "cnext.readers",
    {
        name: f"{__name__}:{name}"
        for name in ("conversation", "generation", "editing", "editing_as_released", "llava", "messages")
    },
    checked,
)
"""Readers by format: functions (row, image folder, sample id, origin) to `Sample`, which raise ValueError for a bad
row."""
