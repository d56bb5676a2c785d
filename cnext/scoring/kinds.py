"""The kind of answer that a question asks for (yes or no, count, color), and answers that are not of that kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from cnext.scoring.answers import normalise, plain

YES_NO = frozenset("yes no maybe unsure unknown".split())
COUNTS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty hundred hundreds thousand dozen dozens half couple pair few several "
    "some many lots lot plenty none no nobody".split()
)
COLORS = frozenset(
    "red green blue yellow purple orange cyan white black brown gray grey pink beige tan gold golden silver maroon "
    "navy teal turquoise violet magenta cream blonde blond brunette khaki bronze copper burgundy lavender aqua peach "
    "olive multicolored multi rainbow clear transparent plaid striped stripes checkered camouflage wood wooden brick "
    "dark light neon".split()
)
KINDS = {"yes or no": YES_NO, "count": COUNTS, "color": COLORS}
"""The words of which an answer of a kind has at least one; a count may have digits instead."""

_ASKS = {"count": re.compile(r"\bhow many\b"), "color": re.compile(r"\b(what|which) colou?rs?\b")}
_OPEN = re.compile(r"\s*(what|which|who|whose|where|when|why|how)\b")
_COORDINATES = re.compile(r"\[\s*[+-]?[\d.]+(\s*,\s*[+-]?[\d.]+){2,}")
_VOWEL = re.compile("[aeiouy]")
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_INITIALS = re.compile(r"([a-z]\.)+[a-z]?")
_OPTION = re.compile(r"\(?[A-Za-z][.):]\s")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", plain(text).casefold())


def known_words(texts: Iterable[str]) -> frozenset[str]:
    """Every word of some texts."""
    return frozenset(word for text in texts for word in words(text))


def asked_kind(instruction: str, reference: str) -> str:
    """The key of ``KINDS`` that a question asks for; "" unless the reference is of that kind itself.

    The reference alone identifies a yes-or-no question; "how many" and "what color" must also stand in the question.
    """
    if normalise(reference) in ("yes", "no"):
        return "yes or no"
    asked = instruction.casefold()
    return next((kind for kind, asks in _ASKS.items() if asks.search(asked) and is_of(kind, reference)), "")


def is_of(kind: str, text: str) -> bool:
    """Whether a text has a word of the kind, or a digit where a count is asked."""
    return not KINDS[kind].isdisjoint(words(text)) or (kind == "count" and any(c.isdigit() for c in text))


def is_of_another_kind(text: str, reference: str, instruction: str) -> bool:
    """Whether an answer cannot be an answer to the question, correct or not.

    "jm" for a color, "fish" for yes or no, "yes" where a question begins with what, who or how, coordinates for a word.
    """
    kind = asked_kind(instruction, reference)
    if kind and not is_of(kind, text):
        return True
    if _COORDINATES.search(text) and not _COORDINATES.search(reference):
        return True
    opened = _OPEN.match(instruction.casefold()) is not None
    return opened and normalise(text) in ("yes", "no") and YES_NO.isdisjoint(words(reference))


def answers_another_question_too(text: str, reference: str) -> bool:
    """Whether the reference is followed by colors, yes or no and nothing else, and has none itself ("snowman blue")."""
    answer, asked = words(text), words(reference)
    others = answer[len(asked) :]
    unasked = COLORS | YES_NO
    return answer[: len(asked)] == asked and bool(others) and unasked.issuperset(others) and unasked.isdisjoint(asked)


def is_no_word(text: str, known: Collection[str]) -> bool:
    """Whether every word is unknown and unpronounceable: letters a to z, no vowel among them, none known, no capitals.

    Args: known: the words of the task's questions and references.
    """
    found = re.findall(r"\w+", text)
    return bool(found) and all(
        word.isascii() and word.isalpha() and word.islower() and not _VOWEL.search(word) and word not in known
        for word in found
    )


def lacks_a_word(text: str, reference: str) -> bool:
    """Whether a word is asked for and there is none, and no number: "[ a" for "boat".

    Outside of ASCII a word may have one letter.
    """
    asked = _TWO_LETTERS.search(reference) is not None
    return asked and text.isascii() and not (_TWO_LETTERS.search(text) or any(c.isdigit() for c in text))


def may_be_short_for(text: str, reference: str) -> bool:
    """Whether letters may abbreviate words: "p.m.", the reference's first letter, any one letter for "A. dog"."""
    answer = text.strip().casefold()
    if len(answer.rstrip(".")) == 1:
        return _OPTION.match(reference) is not None or reference.casefold().startswith(answer.rstrip("."))
    return _INITIALS.fullmatch(answer) is not None
