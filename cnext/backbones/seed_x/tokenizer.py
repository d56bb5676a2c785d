"""The tokenizer of the released models: sentencepiece, as transformers 4.30 called it, and 330 added tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnext.backbones.seed_x.sizes import TOKENS
from cnext.errors import UserError, parse_json

SLOTS = tuple(f"<img_{number:05d}>" for number in range(100))
"""Tokens that stand for visual features; the released models use the first 64."""
TYPED = (*(f"<loc-{number}>" for number in range(224)), "<box_start>", "<box_end>")
"""Added tokens that may stand in a sample's text. Those of images are put in by the program alone."""
IMAGE = ("<img>", "</img>", "<patch>", "</patch>")
ADDED = (*SLOTS, *TYPED, *IMAGE)
UNKNOWN, BEGIN, END = range(3)
PAD = UNKNOWN
_TYPED = re.compile(f"({'|'.join(map(re.escape, TYPED))})")
_MARKUP = re.compile("<[^>]*>")


class Tokenizer:
    """Text and added tokens to ids and back.

    Every stretch of text between added tokens is tokenized on its own, with sentencepiece's leading space, and loses
    the white space next to added tokens: what the released models were trained with.

    Args:
        model: a sentencepiece.SentencePieceProcessor.
        added: name to id of the added tokens.
    """

    def __init__(self, model: Any, added: Mapping[str, int]) -> None:
        self.model, self.added = model, dict(added)
        self.words = len(model)

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """From tokenizer.model and added_tokens.json. Raises UserError where these are not the released models'."""
        import sentencepiece

        file = folder / "added_tokens.json"
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: expected tokenizer.model of sentencepiece, cannot read it: {error}") from error
        try:
            listed = parse_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"expected the added tokens at {file}, cannot read them: {error}") from error
        if not isinstance(listed, dict) or not all(type(number) is int for number in listed.values()):
            raise UserError(f"{file}: expected an object of names and ids")
        pieces = len(model)
        added = {name: number for name, number in listed.items() if number >= pieces}
        missing, strange = [name for name in ADDED if name not in added], sorted(added.keys() - set(ADDED))
        if missing or strange:
            raise UserError(
                f"{file}: expected the {len(ADDED)} added tokens of SEED-X (100 of images, 224 of places, 6 more), "
                f"found {len(added)}{_named('; missing', missing)}{_named('; not of SEED-X', strange)}; take the "
                "folder that was released with the model"
            )
        if sorted(added.values()) != list(range(pieces, pieces + len(ADDED))):
            raise UserError(f"{file}: expected the ids {pieces} to {pieces + len(ADDED) - 1}, each once")
        return cls(model, added)

    def __len__(self) -> int:
        return self.words + len(self.added)

    def __getitem__(self, name: str) -> int:
        return self.added[name]

    @property
    def slots(self) -> list[int]:
        """Ids of the tokens that stand for the features of a view."""
        return [self.added[name] for name in SLOTS[:TOKENS]]

    def picture(self, count: int) -> list[int]:
        """Ids of an image of that many views: the last one, the whole, is in <img>, the others in <patch>."""
        tile = [self["<patch>"], *self.slots, self["</patch>"]]
        return tile * (count - 1) + [self["<img>"], *self.slots, self["</img>"]]

    def encode(self, *parts: str | Sequence[int]) -> list[int]:
        """Ids of text and, given as ids, added tokens."""
        chunks: list[str | int] = []
        for part in parts:
            if isinstance(part, str):
                chunks += [self.added.get(chunk, chunk) for chunk in _TYPED.split(part)]
            else:
                chunks += part
        ids = []
        for place, chunk in enumerate(chunks):
            if isinstance(chunk, int):
                ids.append(chunk)
                continue
            if place:
                chunk = chunk.lstrip()
            if place + 1 < len(chunks):
                chunk = chunk.rstrip()
            ids += self.model.encode(chunk)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without added tokens and anything else in angle brackets."""
        runs: list[list[int]] = [[]]
        for index in ids:
            if index >= self.words:
                runs.append([])
            elif index not in (UNKNOWN, BEGIN, END):
                runs[-1].append(index)
        return _MARKUP.sub("", " ".join(self.model.decode(run) for run in runs if run)).strip()


def _named(label: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{label} {', '.join(names[:4])}{more}" if names else ""
