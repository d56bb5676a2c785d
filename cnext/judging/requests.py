"""What a judge is asked: the prompt, the images, the answer as data, the reply's schema, and their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.image_files import for_web, image_size
from cnext.judging.cases import KINDS, Case
from cnext.regular_files import read_bytes

FOLDER = Path(__file__).parent / "prompts"
VERSION = "v1"
QUESTIONS = ("follows_instruction", "consistent")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {question: {"type": "boolean"} for question in QUESTIONS},
    "required": list(QUESTIONS),
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "temperature": 0,
    "top_p": 1,
    "seed": 0,
    "max_tokens": 64,
    "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}},
}
CHARACTERS_PER_TOKEN, PIXELS_PER_TOKEN = 4, 32
"""For estimates: English text, and the side of the square that is one token in Qwen3-VL."""
REPLY_TOKENS = 20
# Special tokens of chat templates and line separators, which JSON can write by their code points.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>\x7f\x85\u2028\u2029"}


def error_type(follows_instruction: bool, consistent: bool) -> str:
    """The error type of a verdict: instruction unfollowing, else hallucination, else other where both are true."""
    if not follows_instruction:
        return "instruction_unfollowing"
    return "other" if consistent else "hallucination"


@dataclass(frozen=True)
class Prompts:
    """One version of the prompts. Its hash covers the texts, the schema and the parameters of a request."""

    version: str = VERSION

    @cached_property
    def texts(self) -> dict[str, str]:
        """The system prompt of each of `KINDS`, and the reminder after a malformed reply."""
        return {name: (FOLDER / self.version / f"{name}.txt").read_text("utf-8") for name in (*KINDS, "reminder")}

    @cached_property
    def sha256(self) -> str:
        return _digest({"texts": self.texts, "parameters": PARAMETERS})

    def messages(self, case: Case, again: bool = False) -> list[dict[str, Any]]:
        """The messages of one request in OpenAI's format. again: with a reminder, after a malformed reply."""
        shown: list[dict[str, Any]] = []
        for title, path in case.images:
            shown += [{"type": "text", "text": f"{title}:"}, {"type": "image_url", "image_url": {"url": _url(path)}}]
        system = self.texts[case.kind] + ("\n" + self.texts["reminder"] if again else "")
        user = [*shown, {"type": "text", "text": data_block(case)}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def tokens(self, case: Case) -> int:
        """The estimated tokens of a request. Raises UserError for an image that cannot be read."""
        count = ceil((len(self.texts[case.kind]) + len(data_block(case))) / CHARACTERS_PER_TOKEN)
        for _, path in case.images:
            width, height = image_size(path)
            count += ceil(width / PIXELS_PER_TOKEN) * ceil(height / PIXELS_PER_TOKEN)
        return count


def data_block(case: Case) -> str:
    """The texts of a case as one line of JSON between two marks with a hash of the line, which it cannot forge."""
    fields = {"instruction": case.instruction, "expected": case.expected, "answer": case.answer}
    if case.kind in ("draw", "edit"):
        del fields["expected"]
    # A lone surrogate, which a model may emit, cannot be sent.
    line = json.dumps(fields, ensure_ascii=False).translate(_ESCAPES).encode("utf-8", "replace").decode()
    mark = hashlib.sha256(line.encode()).hexdigest()[:16]
    return f"DATA-{mark} {line} DATA-{mark}"


def input_hash(case: Case) -> str:
    """SHA-256 of all that a judge is shown of a case: its texts and its images."""
    pictures = [(title, _picture_hash(path)) for title, path in case.images]
    return _digest([case.kind, case.instruction, case.expected, case.answer, pictures])


def verdict_key(prompts_sha256: str, model: str, case_sha256: str) -> str:
    """The key of the verdict that a model gives under these prompts on this input."""
    return _digest([prompts_sha256, model, case_sha256])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _picture_hash(path: Path) -> str:
    """SHA-256 of an image file, another one where the judge is sent a PNG of what it shows in its place."""
    content = _bytes(path)
    # Not of the PNG, whose bytes depend on the version of Pillow.
    converted = b"" if for_web(path)[1] == content else b"converted"
    return hashlib.sha256(converted + content).hexdigest()


def _url(path: Path) -> str:
    kind, content = for_web(path)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: a judge needs this image, which cannot be read ({error.strerror or error}); put the data folder "
        "back where the run found it, or use --judge rules"
    )
