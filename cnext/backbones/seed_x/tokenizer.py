"""The tokenizer of the released SEED-X models: sentencepiece as in transformers 4.30, and 330 added tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnext.backbones.seed_x.sizes import TOKENS
from cnext.errors import UserError, listed, parse_json
from cnext.regular_files import read_bytes, require_regular

SLOTS = tuple(f"<img_{number:05d}>" for number in range(100))
"""Placeholders of visual features; the released models use the first 64."""
TYPED = (*(f"<loc-{number}>" for number in range(224)), "<box_start>", "<box_end>")
"""Added tokens that are recognized in a sample's text. Those of images are not: only the program inserts them."""
IMAGE = ("<img>", "</img>", "<patch>", "</patch>")
ADDED = (*SLOTS, *TYPED, *IMAGE)
UNKNOWN, BEGIN, END = range(3)
PAD = UNKNOWN
_TYPED = re.compile(f"({'|'.join(map(re.escape, TYPED))})")
_MARKUP = re.compile("<[^>]*>")


class Tokenizer:
    """Encodes text and added tokens to ids, and decodes ids.

    Each piece of text between added tokens is tokenized by itself, with sentencepiece's leading space and without white
    space next to added tokens, as the released models were trained.

    Args:
        model: a sentencepiece.SentencePieceProcessor.
        added: name to id of the added tokens.
    """

    def __init__(self, model: Any, added: Mapping[str, int]) -> None:
        self.model, self.added = model, dict(added)
        self.words = len(model)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Loads tokenizer.model and added_tokens.json. Raises UserError if they are not those of a released model."""
        import sentencepiece

        file = folder / "added_tokens.json"
        try:
            require_regular(folder / "tokenizer.model")
            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: expected tokenizer.model of sentencepiece, cannot read it: {error}") from error
        try:
            table = parse_json(read_bytes(file))
        except (OSError, ValueError) as error:
            raise UserError(f"expected the added tokens at {file}, cannot read them: {error}") from error
        if not isinstance(table, dict) or not all(type(number) is int for number in table.values()):
            raise UserError(f"{file}: expected an object of names and ids")
        pieces = len(model)
        added = {name: number for name, number in table.items() if number >= pieces}
        missing, extra = [name for name in ADDED if name not in added], sorted(added.keys() - set(ADDED))
        kinds = (("missing", missing), ("not of SEED-X", extra))
        if missing or extra:
            problems = "".join(f"; {what} {listed(names)}" for what, names in kinds if names)
            raise UserError(
                f"{file}: expected the {len(ADDED)} added tokens of SEED-X (100 of images, 224 of places, 6 more), "
                f"found {len(added)}{problems}; take the folder that was released with the model"
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
        """Ids of the placeholders of a view's features."""
        return [self.added[name] for name in SLOTS[:TOKENS]]

    def picture(self, count: int) -> list[int]:
        """Ids of an image of ``count`` views: the last, the whole image, within <img>, the others within <patch>."""
        tile = [self["<patch>"], *self.slots, self["</patch>"]]
        return tile * (count - 1) + [self["<img>"], *self.slots, self["</img>"]]

    def encode(self, *parts: str | Sequence[int]) -> list[int]:
        """Ids of parts: text, or ids of added tokens."""
        chunks: list[str | int] = []
        for part in parts:
            if isinstance(part, str):
                chunks += [self.added.get(chunk, chunk) for chunk in _TYPED.split(part)]
            else:
                chunks += part
        ids = []
        for index, chunk in enumerate(chunks):
            if isinstance(chunk, int):
                ids.append(chunk)
                continue
            if index:
                chunk = chunk.lstrip()
            if index + 1 < len(chunks):
                chunk = chunk.rstrip()
            ids += self.model.encode(chunk)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without added tokens and other markup in angle brackets."""
        return self._decoded(ids, {})

    def decode_as_released(self, ids: Iterable[int]) -> str:
        """As `decode`, but </s> and others still stand there when markup is removed: of "x < 3</s>" remains "x"."""
        added = {number: name for name, number in self.added.items() if name not in (*SLOTS, "<img>")}
        return self._decoded(ids, added | {UNKNOWN: "<unk>", BEGIN: "<s>", END: "</s>"})

    def _decoded(self, ids: Iterable[int], spelled: Mapping[int, str]) -> str:
        """Text of ids without markup. spelled: what is written of tokens that are not text, until markup is removed."""
        runs: list[str | list[int]] = [[]]
        for index in ids:
            if index in spelled:
                runs += [spelled[index], []]
            elif index >= self.words:
                runs.append([])
            elif index not in (UNKNOWN, BEGIN, END):
                assert isinstance(runs[-1], list)
                runs[-1].append(index)
        texts = (run if isinstance(run, str) else self.model.decode(run) for run in runs if run)
        return _MARKUP.sub("", " ".join(texts)).strip()
