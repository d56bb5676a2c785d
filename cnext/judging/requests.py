"""What a judge is sent: a prompt, the pictures, and the answer in a data block that it cannot break out of."""

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
from cnext.judging.cases import KINDS, Case
from cnext.judging.verdict import SCHEMA

FOLDER = Path(__file__).parent / "prompts"
VERSION = "v1"
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
_SIGNATURES = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"RIFF", "webp"), (b"GIF8", "gif"))
# Marks of chat templates and of lines end a block for some servers; in JSON they can be written without themselves.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>\x7f\x85\u2028\u2029"}


@dataclass(frozen=True)
class Prompts:
    """One version of the prompts. Its hash covers the texts, the schema and the parameters of a request."""

    version: str = VERSION

    @cached_property
    def texts(self) -> dict[str, str]:
        return {name: (FOLDER / self.version / f"{name}.txt").read_text("utf-8") for name in (*KINDS, "reminder")}

    @cached_property
    def sha256(self) -> str:
        return _digest({"texts": self.texts, "parameters": PARAMETERS})

    def messages(self, case: Case, again: bool = False) -> list[dict[str, Any]]:
        """The messages of one request. again: with a reminder, after a reply that was malformed."""
        shown: list[dict[str, Any]] = []
        for title, path in case.images:
            shown += [{"type": "text", "text": f"{title}:"}, {"type": "image_url", "image_url": {"url": _url(path)}}]
        system = self.texts[case.kind] + ("\n" + self.texts["reminder"] if again else "")
        user = [*shown, {"type": "text", "text": data_block(case)}]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def tokens(self, case: Case) -> tuple[int, int]:
        """Estimated tokens of a request and of its reply."""
        from PIL import Image

        count = ceil((len(self.texts[case.kind]) + len(data_block(case))) / CHARACTERS_PER_TOKEN)
        for _, path in case.images:
            try:
                with Image.open(path) as image:
                    count += ceil(image.width / PIXELS_PER_TOKEN) * ceil(image.height / PIXELS_PER_TOKEN)
            except OSError as error:
                raise _missing(path, error) from error
        return count, REPLY_TOKENS


def data_block(case: Case) -> str:
    """The texts of a case as one line of JSON between two marks, which hold a hash of what stands between them."""
    fields = {"instruction": case.instruction, "expected": case.expected, "answer": case.answer}
    if case.kind in ("draw", "edit"):
        del fields["expected"]
    # Half a surrogate pair, which a model may well say, cannot be sent.
    line = json.dumps(fields, ensure_ascii=False).translate(_ESCAPES).encode("utf-8", "replace").decode()
    mark = hashlib.sha256(line.encode()).hexdigest()[:16]
    return f"DATA-{mark} {line} DATA-{mark}"


def input_hash(case: Case) -> str:
    """sha256 of all that a judge is shown of a case: its texts and the bytes of its pictures."""
    pictures = [(title, hashlib.sha256(_bytes(path)).hexdigest()) for title, path in case.images]
    return _digest([case.kind, case.instruction, case.expected, case.answer, pictures])


def key(prompts_sha256: str, model: str, case_sha256: str) -> str:
    """The name of a verdict: of these prompts, by this model, on this input."""
    return _digest([prompts_sha256, model, case_sha256])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _url(path: Path) -> str:
    content = _bytes(path)
    kind = next((kind for signature, kind in _SIGNATURES if content.startswith(signature)), "")
    if not kind:
        raise UserError(f"{path}: expected a PNG, JPEG, WebP or GIF picture, got something else; mend the file")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _missing(path, error) from error


def _missing(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: a judge needs this picture, which cannot be read ({error.strerror or error}); put the data folder "
        "back where the run found it, or use --judge rules"
    )
