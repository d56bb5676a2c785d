"""What a judge's server returns: a chat completion, the verdict in its text, or an error."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from cnext.errors import parse_json, printable
from cnext.judging.requests import QUESTIONS

SHOWN = 200
"""Characters of a reply or a server's message in errors."""
MOST_OBJECTS = 500
"""JSON objects that are looked at in a text."""
LONGEST_WAIT = 600.0
"""The longest wait in seconds that a server's Retry-After gets."""
_TAG = r"(?:think|thinking|thought|reasoning)"
# Only in front of the answer: the mark may also be quoted from the answer under test.
_REASONING = re.compile(rf"\s*[<\[◁]{_TAG}[>\]▷](?:.*?[<\[◁]/{_TAG}[>\]▷]|.*)", re.DOTALL | re.IGNORECASE)
_REASONING_ENDS = re.compile(rf"[<\[◁]/{_TAG}[>\]▷]", re.IGNORECASE)
_FENCE = re.compile(r"\s*```\w*\s*(.*?)\s*```\s*", re.DOTALL)
_OBJECT = re.compile(r"\{(?=\s*[\w\"'}])")
_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SEPARATORS = re.compile(r"[\W_]+")
_KEYS = "|".join(question.replace("_", r"[\s_-]*") for question in QUESTIONS)
# In an object that is not quite JSON: other quotes, True for true, a comma at the end.
_FIELD = re.compile(rf"""["']?\b({_KEYS})["']?\s*:\s*["']?({"|".join(_BOOLEANS)})["']?\s*(?=[,}}])""", re.IGNORECASE)


class NoVerdict(Exception):
    """A case stays without a verdict. reason: of all such cases.  shown: what came this time."""

    def __init__(self, reason: str, shown: str = "") -> None:
        super().__init__(f"{reason}: '{line(shown)}'" if shown else reason)
        self.reason = reason


class Malformed(NoVerdict):
    """A reply without the JSON object asked for."""


class NoReply(NoVerdict):
    """One request got no reply in all its tries, or is refused; others may get one."""


class ServerError(Exception):
    """An error that a server returns.

    status: of HTTP, or within a response whose HTTP status is 200.  text: everything it says.  retry_after: seconds.
    """

    def __init__(self, status: int, message: str, text: str, retry_after: float = 0.0) -> None:
        super().__init__(line(message))
        self.status, self.text, self.retry_after = status, text, retry_after


class Reply(msgspec.Struct, frozen=True):
    """A judge's answers to the two questions."""

    follows_instruction: bool
    consistent: bool


@dataclass(frozen=True)
class Completion:
    """A chat completion.

    served: the model as the server names it.  tokens: as the server counts them, may be empty.
    parameters: see `parameters.changes`.
    """

    content: str
    served: str
    tokens: dict[str, int]
    finish_reason: str = "stop"
    refusal: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


def parse(content: str, data: str = "") -> Reply:
    """The two answers of a reply, from a JSON object that may have further keys, a fence, or text around it.

    What stands before the end of the model's reasoning does not count.

    Args:
        data: the texts of the case. Where they contain such an object, a reply may quote it, and counts only if it is
            the object alone.

    Raises:
        Malformed: there is no such object, or there are several that differ.
    """
    place = 0
    while reasoning := _REASONING.match(content, place):
        place = reasoning.end()
    text = content[place:]
    # A chat template may open the reasoning itself. Such a mark in the case's texts may be quoted.
    if not _REASONING_ENDS.search(data):
        text = _REASONING_ENDS.split(text)[-1]
    fenced = _FENCE.fullmatch(text)
    text = fenced[1] if fenced else text.strip()
    try:
        found = [(reply, part) for value, part in _objects(text) if (reply := _reply(value))]
    except RecursionError as error:
        raise Malformed("nested too deeply", content) from error
    if not found:
        raise Malformed(_why_none(text), content or "(empty)")
    if len({reply for reply, _ in found}) > 1:
        raise Malformed("several verdicts that differ", content)
    if found[0][1] != text and _quotable(data):
        raise Malformed("not the JSON object alone", content)
    return found[0][0]


def _quotable(data: str) -> bool:
    """Whether a reply may have quoted a verdict from these texts."""
    try:
        return any(_reply(value) for value, _ in _objects(data))
    except (RecursionError, Malformed):
        return True


def _why_none(text: str) -> str:
    if not text:
        return "empty"
    return "not the two booleans asked for" if next(_objects(text), None) else "not JSON"


def _objects(text: str) -> Iterator[tuple[dict[str, bool | None], str]]:
    """The answers of each JSON object in a text, with its text; also of those within one that is no verdict."""
    decoder, place = json.JSONDecoder(object_pairs_hook=_clear), 0
    tried = 0
    while start := _OBJECT.search(text, place):
        place, tried = start.start(), tried + 1
        # Each may cost the time of the whole text.
        if tried > MOST_OBJECTS:
            raise Malformed(f"more than {MOST_OBJECTS} JSON objects", text)
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError:
            flat = _FLAT_OBJECT.match(text, place)
            value, end = (_clear(_FIELD.findall(flat[0])), flat.end()) if flat else (None, place)
        if isinstance(value, dict):
            yield value, text[place:end]
        place = end if value and _reply(value) else place + 1


def _clear(pairs: list[tuple[str, Any]]) -> dict[str, bool | None]:
    """The questions that an object of these pairs answers, but for those that it answers twice and differently."""
    said: dict[str, set[bool | None]] = {}
    for key, value in pairs:
        said.setdefault(_SEPARATORS.sub("", key).lower(), set()).add(_boolean(value))
    found = {question: said.get(question.replace("_", ""), set()) for question in QUESTIONS}
    return {question: values.pop() for question, values in found.items() if len(values) == 1}


def _reply(value: dict[str, bool | None]) -> Reply | None:
    follows, consistent = (value.get(question) for question in QUESTIONS)
    return None if follows is None or consistent is None else Reply(follows, consistent)


def _boolean(value: Any) -> bool | None:
    return _BOOLEANS.get(str(value).strip().lower()) if isinstance(value, str | int) else None


def read(body: str, headers: Mapping[str, str]) -> Completion:
    """The chat completion in the body of a response of status 200.

    Raises:
        ServerError: the body is an error.
        Malformed: it is neither.
    """
    try:
        return _completion(body, headers)
    except (ValueError, RecursionError) as error:
        raise Malformed("no chat completion", body or "(empty)") from error


def _completion(body: str, headers: Mapping[str, str]) -> Completion:
    value = parse_json(body)
    if not isinstance(value, dict) or not isinstance(value.get("choices") or [], list):
        raise Malformed("no chat completion", body)
    if value.get("error") or (not value.get("choices") and value.keys() & {"detail", "message"}):
        raise server_error(200, body, headers)
    # No more than one choice is asked for; the first counts.
    choice = (value.get("choices") or [None])[0]
    if not isinstance(choice, dict):
        raise Malformed("no chat completion", body)
    if choice.get("error") or choice.get("finish_reason") == "error":
        raise server_error(200, json.dumps(choice), headers)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("no chat completion", body)
    said = "\n".join(part for part in (_text(message.get("content")), *_arguments(message)) if part.strip())
    # Some servers take the whole reply for reasoning.
    said = said if said.strip() else _text(message.get("reasoning_content") or message.get("reasoning"))
    refusal = _word(message.get("refusal")) or _text(message.get("content"), "refusal")
    ended = _word(choice.get("finish_reason")) or "stop"
    return Completion(said, line(_word(value.get("model"))), _tokens(value.get("usage")), ended, refusal)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _text(content: Any, kind: str = "text") -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(_word(part.get(kind)) for part in parts if part.get("type") in (kind, f"output_{kind}"))
    return content if isinstance(content, str) and kind == "text" else ""


def _arguments(message: dict[str, Any]) -> Iterator[str]:
    """The arguments of the functions that a message calls, as JSON."""
    calls = message.get("tool_calls")
    called = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    for function in (*called, message.get("function_call")):
        given = function.get("arguments") if isinstance(function, dict) else None
        yield given if isinstance(given, str) else json.dumps(given) if given else ""


def _tokens(usage: Any) -> dict[str, int]:
    names = ("prompt_tokens", "completion_tokens")
    counts = {name: usage.get(name) for name in names} if isinstance(usage, dict) else {}
    return {name: count for name, count in counts.items() if type(count) is int and 0 <= count < 2**53}


def server_error(status: int, body: str, headers: Mapping[str, str]) -> ServerError:
    """The error in the body of a response. One without a code in a response of status 200 is taken for a 500."""
    try:
        value = parse_json(body)
    except (ValueError, RecursionError):
        value = body
    value = value[0] if isinstance(value, list) and value else value
    error = (value.get("error") or value) if isinstance(value, dict) else value
    texts = [*_strings(error)] or [body]
    message = error.get("message") if isinstance(error, dict) else None
    if status == 200:
        code = error.get("code", error.get("status")) if isinstance(error, dict) else None
        code = str(code) if isinstance(code, str | int) else ""
        status = int(code) if re.fullmatch(r"[45][0-9]{2}", code) else 500
    shown = message if isinstance(message, str) else " ".join(texts)
    return ServerError(status, shown, " ".join(texts), _retry_after(headers))


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, apart from what it repeats of the request. It may be nested to any depth."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            parts = value if isinstance(value, list) else [part for key, part in value.items() if key != "input"]
            left += reversed(parts)


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait, by a number or a date; 0 where it does not."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return min(max(float(headers.get(name, "")) * unit, 0.0), LONGEST_WAIT)
        except ValueError:
            continue
    try:
        until = parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(until - time.time(), 0.0), LONGEST_WAIT)


def line(text: str) -> str:
    """The beginning of what a server sent, in one line that can be shown."""
    return printable(" ".join(text[: 10 * SHOWN].split())[:SHOWN])
