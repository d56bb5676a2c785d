"""Tokenizer of the embedded backbones: a closed vocabulary; other words are spelled letter by letter."""

from __future__ import annotations

import re

SPECIAL = ("<pad>", "<s>", "</s>", "[inst]", "[/inst]", "<img>", "</img>", "<patch>")
PUNCTUATION = ("[", "]", ",", ";", "?", ".", ":", "0.", "\n")
DIGITS = tuple("0123456789")
LETTERS = tuple(f"#{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")
WORDS = tuple(
    # colors, shapes, places
    "red green blue yellow purple orange cyan white circle square triangle diamond cross ring "
    "top bottom left right "
    # icons
    "house tree boat fish sun flower cup flag car face snowman mushroom "
    # the benchmark's instructions and answers
    "what color is the shape object how many objects are there in a an image answer question using single word or "
    "phrase please generate written provide bounding box coordinate of region this sentence describes change to turn "
    "into remove add and yes no "
    # the pretraining corpus
    "describe picture tell me it short say find at where x y w h read letters text draw recolor morph erase paint copy "
    "place name".split()
)

_PIECES = re.compile(r"<pad>|</?s>|\[/?inst\]|</?img>|<patch>|0\.(?=\d)|[a-z]+|\d|[\[\],;?.:\n]")


class TinyTokenizer:
    """Encodes text to ids and decodes ids. Case is folded; characters outside the vocabulary are dropped.

    words: those with a token of their own.
    """

    def __init__(self, words: tuple[str, ...] = WORDS) -> None:
        self.tokens = SPECIAL + PUNCTUATION + DIGITS + LETTERS + words
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        assert len(self.ids) == len(self.tokens), "a token is listed twice"

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> int:
        return self.ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A word outside the vocabulary becomes its letters: "fox" is "#f", "#o", "#x"."""
        ids: list[int] = []
        for piece in _PIECES.findall(text.lower()):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids += [self.ids[f"#{letter}"] for letter in piece]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out. Letters join to words, digits and brackets to boxes."""
        text = ""
        previous = ""
        for index in ids:
            token = self.tokens[index]
            if token in SPECIAL or token == "\n":
                continue
            spelled = token.startswith("#")
            glued = (
                (spelled and previous.startswith("#"))
                or (token in PUNCTUATION + DIGITS and previous in PUNCTUATION + DIGITS)
                or token in ",;?.:"
            )
            text += ("" if glued or not text else " ") + (token[1:] if spelled else token)
            previous = token
        return text
