"""String functions on answers: normal form, repetitions, containment."""

from __future__ import annotations

import re
from collections import Counter

ARTICLES = ("a", "an", "the")
MAX_REPEATS = 2
"""An answer that has a word more often than this is a repetition loop."""


def normalise(text: str) -> str:
    """The form in which the strict profile compares answers.

    Case is folded, runs of white space become one space, one final period is removed, and a leading article that is
    followed by further words ("A cat." and "cat" agree; the answer "A" stays "a").
    """
    words = text.casefold().strip().removesuffix(".").split()
    if len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words)


def repeats_a_word(text: str) -> bool:
    """Whether a word, as split on white space and with its case, occurs more than ``MAX_REPEATS`` times."""
    return any(count > MAX_REPEATS for count in Counter(text.split()).values())


def contains_words(text: str, phrase: str) -> bool:
    """Whether the text contains the words of the phrase, whole and in sequence, after ``normalise``."""
    phrase = normalise(phrase)
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", normalise(text)) is not None
