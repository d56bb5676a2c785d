"""What can be said of an answer's words alone: its normal form, its repetitions, what it contains."""

from __future__ import annotations

import re
from collections import Counter

ARTICLES = ("a", "an", "the")
MAX_REPEATS = 2
"""An answer in which a word occurs more often than this is a repetition loop."""


def normalise(text: str) -> str:
    """The form in which strict answers are compared.

    Case is folded, runs of white space become one space, one final period goes, and so does a leading article that
    further words follow ("A cat." and "cat" agree; the answer "A" stays "a").
    """
    words = text.casefold().strip().removesuffix(".").split()
    if len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words)


def repeats_a_word(text: str) -> bool:
    """Whether a word, as split on white space and with its case, occurs more than ``MAX_REPEATS`` times."""
    return any(count > MAX_REPEATS for count in Counter(text.split()).values())


def contains_words(text: str, phrase: str) -> bool:
    """Whether the words of the phrase stand in the text, whole and in a row, after ``normalise``."""
    phrase = normalise(phrase)
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", normalise(text)) is not None
