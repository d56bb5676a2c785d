"""Classify wrong answers by error type, with rules.

Instruction unfollowing takes precedence: the content of a malformed answer is not examined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import fsum

from cnext.scoring import kinds
from cnext.scoring.answers import contains_words, normalise, plain, repeats_a_word
from cnext.scoring.base import ERROR_TYPES, Prediction, Score

MAX_WORDS = 5
"""The most words that count as "a single word or phrase"; a longer reference raises it to its own length."""


def text_error(
    prediction: Prediction, reference: str, instruction: str = "", known: Collection[str] | None = None
) -> str:
    """The error type of a wrong short answer.

    instruction_unfollowing: an image was generated, the text is empty, has more than ``MAX_WORDS`` words or a word more
    than twice, is an answer of another kind than the question asks for ("fish" for a color), a second answer after the
    first ("snowman blue"), or what is no word at all ("djt", "[ a").
    other: well formed, and the answer's words contain the reference's or the reverse ("red circle" for "red"):
    wrong under exact match, but not made up.
    hallucination: any other well-formed answer.

    Args:
        known: the words of the task's questions and references; None where answers are read from
            an image and need not be words.
    """
    text, reference = plain(prediction.text), plain(reference)
    allowed = max(MAX_WORDS, len(reference.split()))
    malformed = (
        prediction.image is not None
        or not normalise(text)
        or len(text.split()) > allowed
        or repeats_a_word(text)
        or kinds.is_of_another_kind(text, reference, instruction)
        or kinds.answers_another_question_too(text, reference)
        or (known is not None and _says_no_word(text, reference, known))
    )
    if malformed:
        return "instruction_unfollowing"
    if contains_words(text, reference) or contains_words(reference, text):
        return "other"
    return "hallucination"


def _says_no_word(text: str, reference: str, known: Collection[str]) -> bool:
    no_word = kinds.is_no_word(text, known) or kinds.lacks_a_word(text, reference)
    return no_word and not kinds.may_be_short_for(text, reference)


def box_error(prediction: Prediction, parsable: bool) -> str:
    """The error type of a wrong box: instruction_unfollowing where an image was generated or no box can be parsed."""
    return "hallucination" if parsable and prediction.image is None else "instruction_unfollowing"


def image_error(prediction: Prediction) -> str:
    """The error type of an image short of 100: instruction_unfollowing where none was generated."""
    return "instruction_unfollowing" if prediction.image is None else "hallucination"


def error_shares(scores: Sequence[Score], profile: str = "strict") -> dict[str, float]:
    """Percent of the attainable score lost to each error type: E_c = (1/n) Σ_{s of type c} (100 - score_s).

    The shares add up to 100 minus the mean score. Under "paper", errors of an answer that is correct under
    strict (a box that the released parser misreads) are classified as "other".

    Args:
        scores: at least one score.
        profile: one of ``PROFILES``.

    Returns:
        A share for every one of ``ERROR_TYPES``.
    """
    assert scores, "no scores to share out"
    lost: dict[str, list[float]] = {kind: [] for kind in ERROR_TYPES}
    for score in scores:
        lost[score.error or "other"].append(100.0 - getattr(score, profile))
    return {kind: fsum(parts) / len(scores) for kind, parts in lost.items()}
