"""String functions on answers: one spelling for all, normal form, repetitions, containment."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

ARTICLES = ("a", "an", "the")
MAX_REPEATS = 2
"""An answer that has a word more often than this is a repetition loop."""

# Soft hyphen, zero-width space, word joiner, byte order mark, variation selectors, marks of direction.
_INVISIBLE = "\u00ad\u200b\u2060\ufeff\ufe0e\ufe0f\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SINGLE, _DOUBLE = "\u2018\u2019\u201b\u02bc\u2032\u00b4", "\u201c\u201d\u201e\u201f\u2033"
_HYPHENS = "\u2010\u2011\u2012\u2013\u2212"
_SPELLING = str.maketrans(
    _SINGLE + _DOUBLE + _HYPHENS, "'" * len(_SINGLE) + '"' * len(_DOUBLE) + "-" * len(_HYPHENS), _INVISIBLE
)
_FINAL_PERIOD = re.compile(r"[.。]\Z")


def plain(text: str) -> str:
    """One spelling of a text that can be typed in several, as the strict profile reads answers and references.

    Composed letters (NFC); full-width and half-width forms as ordinary letters, digits and punctuation; straight quotes
    and hyphens; no soft hyphens, zero-width spaces or marks of direction. Superscripts, ligatures and fractions stay:
    "10²" is not "102".
    """
    if text.isascii():
        return text
    spelled = text.translate(_SPELLING)
    return unicodedata.normalize("NFC", "".join(map(_of_usual_width, spelled)))


def _of_usual_width(character: str) -> str:
    kind, _, usual = unicodedata.decomposition(character).partition(" ")
    return chr(int(usual, 16)) if kind in ("<wide>", "<narrow>") else character


def normalise(text: str) -> str:
    """The form in which the strict profile compares answers.

    The spelling is that of ``plain``, case is folded, runs of white space become one space, one final period, "." or
    "。", is removed, and a leading article that is followed by further words ("A cat." and "cat" agree; the answer "A"
    stays "a").
    """
    folded = unicodedata.normalize("NFC", plain(text).casefold())
    words = _FINAL_PERIOD.sub("", folded.strip()).split()
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
