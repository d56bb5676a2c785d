"""A model's verdict on one answer: two booleans in JSON, and the error type that follows from them."""

from __future__ import annotations

import json
from typing import Any

QUESTIONS = ("follows_instruction", "consistent")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {question: {"type": "boolean"} for question in QUESTIONS},
    "required": list(QUESTIONS),
    "additionalProperties": False,
}


class Malformed(ValueError):
    """A reply that is not the JSON object asked for."""


def parse(content: str | None) -> dict[str, bool]:
    """The two booleans of a reply.

    Raises:
        Malformed: the reply is anything but one JSON object with exactly these two booleans.
    """
    content = content or ""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {content[:80]!r}") from error
    if not isinstance(value, dict) or value.keys() != set(QUESTIONS):
        raise Malformed(f"not an object with {' and '.join(QUESTIONS)}: {content[:80]!r}")
    if any(type(answer) is not bool for answer in value.values()):
        raise Malformed(f"not booleans: {content[:80]!r}")
    return value


def error_type(follows_instruction: bool, consistent: bool) -> str:
    """The error type. Instruction unfollowing wins where both went wrong; other is where neither did."""
    if not follows_instruction:
        return "instruction_unfollowing"
    return "other" if consistent else "hallucination"
