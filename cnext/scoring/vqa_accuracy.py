"""The soft accuracy of VQA: an answer against those of ten people, both in the normal form of the VQA challenge."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANNOTATORS = 10
NEEDED = 3
"""An answer that this many other people gave is right in full."""
_DIGITS = {
    word: str(digit) for digit, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = int(re.UNICODE)
"""The released code passes this flag where the number of substitutions belongs."""
_NEGATED = "ai are ca could did does do had has have is might must need ought sha was were wo would should".split()
_CONTRACTED = (
    *(f"{verb}n't" for verb in _NEGATED),
    *(f"{verb}n't've" for verb in ("could", "had", "might", "should", "would")),
    *(f"{verb}'ve" for verb in "could might must not should they we what where who would you".split()),
    *(f"{who}'d've" for who in "he it she somebody someone something there they we who y'all you".split()),
    *(f"{who}'d" for who in "he how it someone there they where who you".split()),
    *(f"{who}'ll" for who in "how it somebody someone something they what who why y'all you".split()),
    *(f"{who}'re" for who in "there they what why you".split()),
    *(f"{who}'s" for who in "he how somebody someone that there what when where who why".split()),
    *("ma'am", "o'clock", "'ow's'at", "'twas", "y'all"),
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {short: word for word in _CONTRACTED for short in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"


def challenge_form(text: str) -> str:
    """An answer in the normal form of the VQA challenge, as the code that TextVQA published has it.

    Lower case, no commas, question marks and articles, number words up to ten as digits, contractions with their
    apostrophe ("dont" is "don't"). A punctuation mark becomes a space, or nothing where it stands beside a space
    anywhere in the text. Periods go unless a digit follows, the first 32 of them.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = words.replace("\n", " ").replace("\t", " ").strip()
    found = words
    for mark in _PUNCTUATION:
        beside = f"{mark} " in words or f" {mark}" in words
        found = found.replace(mark, "" if beside else " ")
    digits = [_DIGITS.get(word, word) for word in _PERIOD.sub("", found, count=_MOST_PERIODS).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def soft_accuracy(answer: str, given: Sequence[str]) -> float:
    """The share of an answer, from 0 to 1: min(others who gave it / 3, 1), averaged over leaving out one person each.

    Reference: ``m4c_evaluator.py`` of TextVQA's authors, which CoIN uses.
    """
    said = challenge_form(answer)
    same = [challenge_form(each) == said for each in given]
    shares = [min((sum(same) - left_out) / NEEDED, 1) for left_out in same]
    return sum(shares) / len(shares)
