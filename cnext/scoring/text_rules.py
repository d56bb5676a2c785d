"""Rules for the error type of a wrong short answer, each of which a reader can check by the answer alone.

``RULES`` has them in the order in which they are asked; docs/judge.md lists them under the same names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cnext.scoring.answers import normalise, plain, repeats_a_word
from cnext.scoring.base import Prediction

MAX_WORDS = 5
"""The most words that count as "a single word or phrase"; a longer reference raises it to its own length."""
YES_NO = frozenset("yes no maybe unsure unknown".split())
NUMBERS = {
    name: str(value)
    for value, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}
NUMBERS |= {
    name: str(10 * value)
    for value, name in enumerate("thirty forty fifty sixty seventy eighty ninety hundred".split(), start=3)
}
COUNTS = frozenset(NUMBERS) | frozenset(
    "hundreds thousand dozen dozens half couple pair few several some many lots lot plenty none no nobody".split()
)
COLORS = frozenset(
    "red green blue yellow purple orange cyan white black brown gray grey pink beige tan gold golden silver maroon "
    "navy teal turquoise violet magenta cream blonde blond brunette khaki bronze copper burgundy lavender aqua peach "
    "olive multicolored multi rainbow clear transparent plaid striped stripes checkered camouflage wood wooden brick "
    "dark light neon".split()
)
AFTER = frozenset("red green blue yellow purple orange cyan magenta white black brown gray grey pink".split())
"""Colors that no noun ends in, as "ice cream" and "traffic light" do: after another word they are a second answer."""
KINDS = {"yes or no": YES_NO, "count": COUNTS, "color": COLORS}
"""The words of which an answer of a kind has at least one; a count may have digits instead."""
RESTATING = frozenset("it is are was were the a an this that there of in on at to and not here".split())
"""Words that say nothing beside an answer: "no it is not" says "no"."""
NO_END = frozenset("a an the and or of at as to with from".split())
"""Words that no phrase ends in."""
NO_ANSWER = NO_END | frozenset("it is are was were what which who whose where when why how".split())
"""Words that answer nothing alone."""
SHORT = frozenset(
    "a i ad ah am an as at ax be by cd dj do go ha he hi id if in is it ma me my no of oh ok on or ox pa pc pi re so "
    "to tv uk up us we mr mrs ms dr st mt ft vs nyc bbq bmw dvd gps hdtv hwy kfc lb kg cm mlb mm mtv km mph nbc nfl "
    "nhl pm rv".split()
)
"""Words of one or two letters, and abbreviations without a vowel."""
IRREGULAR = {
    "children": "child", "people": "person", "feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose",
    "knives": "knife", "leaves": "leaf", "wolves": "wolf", "shelves": "shelf",
}  # fmt: skip
"""Plurals that no ending gives away."""

_ASKS = {"count": re.compile(r"\bhow many\b"), "color": re.compile(r"\b(what|which) colou?rs?\b")}
_ASKS_A_WORD = re.compile(r"\b(what|which|one) word\b")
_OPEN = re.compile(r"\s*(what|which|who|whose|where|when|why|how)\b")
_ASKS_A_THING = re.compile(
    r"\s*(who\b|(what|which) (color|colour|shape|object|thing|animal|person|fruit|food|vegetable|sport|room)\b"
    r"|what is the (object|thing|animal|shape|color|colour)\b)"
)
_COORDINATES = re.compile(r"\[\s*[+-]?[\d.]+(\s*,\s*[+-]?[\d.]+){2,}")
_STRAY = re.compile(r"^\s*[,;:)\]}]|<\w+>")
_VOWEL = re.compile("[aeiouy]")
_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_INITIALS = re.compile(r"([a-z]\.)+[a-z]?")
_OPTION = re.compile(r"\(?[a-z][.):]\s")
# A number keeps its sign, decimals and colons: -5, 1.5 and 10:30 are one word each.
_WORD = re.compile(r"(?<!\w)-?\d+(?:[.,:/]\d+)+|(?<!\w)-\d+|\w+")


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case, without punctuation and a leading article."""
    return _WORD.findall(normalise(text))


def alike(word: str) -> str:
    """One form for a word's singular and plural, and for a number in digits and in letters.

    Example:
        >>> [alike(word) for word in ("boxes", "puppies", "two", "bus", "glass")]
        ['box', 'puppy', '2', 'bus', 'glass']
    """
    if word in NUMBERS:
        return NUMBERS[word]
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("men"):
        return word[:-2] + "an"
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def form(text: str, read: bool) -> tuple[str, ...]:
    """The words of a text as answers are compared: each as `alike` has it, but not where letters are read."""
    found = words(text)
    return tuple(found) if read else tuple(map(alike, found))


@dataclass(frozen=True)
class Asked:
    """What a task asks for and accepts, as far as its samples tell.

    words: every word of questions and references; None where it is not known.  answers: by question, the accepted
    answers, each as `form` has it.  read: whether answers are read from an image letter by letter and need be no words.
    """

    words: frozenset[str] | None = None
    answers: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    read: bool = False

    @classmethod
    def of(cls, samples: Iterable[tuple[str, str]], read: bool = False) -> Asked:
        """From (question, reference) of each sample."""
        found: set[str] = set()
        answers: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        for question, reference in samples:
            found.update(words(question), words(reference))
            answers[question].add(form(reference, read))
        return cls(frozenset(found), {question: frozenset(each) for question, each in answers.items()}, read)


@dataclass(frozen=True)
class Wrong:
    """A wrong answer, the question and what would have been right, in the forms that rules compare."""

    prediction: Prediction
    reference: str
    question: str
    asked: Asked

    @cached_property
    def text(self) -> str:
        """The answer in one spelling, see `plain`."""
        return plain(self.prediction.text)

    @cached_property
    def right(self) -> str:
        """The reference in one spelling."""
        return plain(self.reference)

    @cached_property
    def said(self) -> tuple[str, ...]:
        """The answer's words, see `form`."""
        return form(self.text, self.asked.read)

    @cached_property
    def expected(self) -> tuple[str, ...]:
        """The reference's words."""
        return form(self.right, self.asked.read)

    @cached_property
    def named(self) -> frozenset[str]:
        """The question's words."""
        return frozenset(form(self.question, self.asked.read))

    def is_accepted(self, said: tuple[str, ...]) -> bool:
        """Whether words are the reference, or another answer that the same question accepts."""
        return said == self.expected or said in self.asked.answers.get(self.question, ())


def _is_long(wrong: Wrong) -> bool:
    return len(wrong.text.split()) > max(MAX_WORDS, len(wrong.right.split()))


def _is_the_question(wrong: Wrong) -> bool:
    asked = words(wrong.question)[:3]
    return len(asked) == 3 and words(wrong.text)[:3] == asked != words(wrong.right)[:3]


def _has_stray_marks(wrong: Wrong) -> bool:
    """A comma or colon first, a bracket without its partner, a tag such as <image>; where the reference has none."""

    def stray(text: str) -> bool:
        return _STRAY.search(text) is not None or any(text.count(a) != text.count(b) for a, b in ("[]", "{}"))

    return stray(wrong.text) and not stray(wrong.right)


def asked_kind(question: str, reference: str) -> str:
    """The key of ``KINDS`` that a question asks for; "" unless the reference is of that kind itself.

    The reference alone identifies a yes-or-no question; "how many" and "what color" must also stand in the question.
    """
    if normalise(reference) in ("yes", "no"):
        return "yes or no"
    asked = question.casefold()
    return next((kind for kind, asks in _ASKS.items() if asks.search(asked) and is_of(kind, reference)), "")


def is_of(kind: str, text: str) -> bool:
    """Whether a text has a word of the kind, or a digit where a count is asked."""
    return not KINDS[kind].isdisjoint(words(text)) or (kind == "count" and _has_digits(text))


def _has_digits(text: str) -> bool:
    return any(c.isdigit() for c in text)


def _is_of_another_kind(wrong: Wrong) -> bool:
    """No word of the kind asked for; coordinates; yes or no to an open question; a number for a thing.

    Also several words where one word is asked for, and the right one is not among them.
    """
    text, right, question = wrong.text, wrong.right, wrong.question.casefold()
    kind = asked_kind(question, right)
    if kind and not is_of(kind, text):
        return True
    if _COORDINATES.search(text) and not _COORDINATES.search(right):
        return True
    if (
        _ASKS_A_WORD.search(question)
        and len(wrong.expected) == 1 < len(wrong.said)
        and wrong.expected[0] not in wrong.said
    ):
        return True
    if _ASKS_A_THING.match(question) and _has_digits(text) and not (_has_digits(right) or any(map(str.isalpha, text))):
        return True
    return bool(_OPEN.match(question)) and normalise(text) in ("yes", "no") and YES_NO.isdisjoint(words(right))


def _answers_nothing(wrong: Wrong) -> bool:
    """Only words that answer nothing alone, such as "and", "how" and "to"; what is read may be any word."""
    if wrong.asked.read or _may_be_short_for(wrong):
        return False
    return NO_ANSWER.issuperset(wrong.said) and NO_ANSWER.isdisjoint(wrong.expected)


def _has_no_word(wrong: Wrong) -> bool:
    """A word is none: lower-case letters a to z without a vowel or of one or two, which neither task nor language has.

    Also an answer without a word or number where a word is asked for, as "[ a" for "boat".
    """
    if wrong.asked.read or wrong.asked.words is None or _may_be_short_for(wrong):
        return False
    text, known = wrong.text, SHORT | wrong.asked.words
    lacks = _TWO_LETTERS.search(wrong.right) and text.isascii() and not (_TWO_LETTERS.search(text) or _has_digits(text))
    return bool(lacks) or any(
        word.isascii()
        and word.isalpha()
        and word.islower()
        and word not in known
        and (len(word) <= 2 or not _VOWEL.search(word))
        for word in re.findall(r"[\w'-]+", text)
    )


def _may_be_short_for(wrong: Wrong) -> bool:
    """Whether letters may stand for an answer: "p.m.", the reference's first letter, any one for "A. dog" or "B"."""
    answer, right = wrong.text.strip().casefold(), wrong.right.strip().casefold()
    letter = answer.rstrip(".")
    if len(letter) == 1:
        return len(right.rstrip(".")) == 1 or _OPTION.match(right) is not None or right.startswith(letter)
    return _INITIALS.fullmatch(answer) is not None


def _breaks_off(wrong: Wrong) -> bool:
    """Several words, the last of which ends no phrase: "blue a"; what is read may end anywhere."""
    said = words(wrong.text)
    return not wrong.asked.read and len(said) > 1 and said[-1] in NO_END and said[-1:] != words(wrong.right)[-1:]


def _goes_on(wrong: Wrong) -> bool:
    """A whole answer, and then something that was not asked for.

    A whole answer is the reference, or another that the same question accepts. Words of the question, and words that
    restate, may follow: "red circle" for "What color is the circle?". What the question accepts as it stands has no
    part that follows. A color after any other word was not asked for either ("house blue"), unless the reference has a
    color or answers are read from an image.
    """
    said = wrong.said
    if not said or wrong.is_accepted(said):
        return False
    may_follow = wrong.named | RESTATING
    for end in range(1, len(said)):
        if not may_follow.issuperset(said[end:]) and wrong.is_accepted(said[:end]):
            return True
    colored = said[-1] in AFTER - wrong.named and not COLORS.issuperset(said)
    return colored and not wrong.asked.read and (COLORS | YES_NO).isdisjoint(wrong.expected)


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return bool(part) and any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _is_in_another_form(wrong: Wrong) -> bool:
    """The same words but for plural, numbers in letters, marks or spaces ("snow man").

    Of what is read letter by letter, the same but for marks.
    """
    if wrong.said == wrong.expected:
        return bool(wrong.said)
    joined = "".join(wrong.said)
    same = bool(joined) and joined == "".join(wrong.expected)
    return same and not wrong.asked.read and not _has_digits(joined)


def _is_in_part(wrong: Wrong) -> bool:
    """One of answer and reference has all words of the other, one after another: "dark red" for "red"."""
    return _within(wrong.said, wrong.expected) or _within(wrong.expected, wrong.said)


IUF, OTHER, HALLUCINATION = "instruction_unfollowing", "other", "hallucination"
RULES: dict[str, tuple[str, Callable[[Wrong], bool]]] = {
    "image": (IUF, lambda wrong: wrong.prediction.image is not None),
    "empty": (IUF, lambda wrong: not normalise(wrong.text)),
    "long": (IUF, _is_long),
    "loop": (IUF, lambda wrong: repeats_a_word(wrong.text)),
    "echo": (IUF, _is_the_question),
    "marks": (IUF, _has_stray_marks),
    "kind": (IUF, _is_of_another_kind),
    "no answer": (IUF, _answers_nothing),
    "no word": (IUF, _has_no_word),
    "breaks off": (IUF, _breaks_off),
    "goes on": (IUF, _goes_on),
    "form": (OTHER, _is_in_another_form),
    "part": (OTHER, _is_in_part),
    "wrong": (HALLUCINATION, lambda wrong: True),
}
"""(error type, whether it applies) by name; the first that applies decides."""


def first(wrong: Wrong) -> str:
    """The name of the rule that decides."""
    return next(name for name, (_, applies) in RULES.items() if applies(wrong))
