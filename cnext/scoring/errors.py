"""Classify wrong answers by error type, with rules that docs/judge.md lists."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from cnext.scoring import text_rules
from cnext.scoring.base import ERROR_TYPES, Prediction, Score
from cnext.scoring.text_rules import Asked, Wrong

RULES_VERSION = 2
"""Part of a run's fingerprint: raised whenever an answer's type may change."""
NEAR = 0.1
"""IoU from which a wrong box is a localization error and not a box of something else (Hoiem et al., ECCV 2012)."""


def text_error(prediction: Prediction, reference: str, instruction: str = "", asked: Asked | None = None) -> str:
    """The error type of a wrong short answer, by the first of `text_rules.RULES` that applies.

    instruction_unfollowing: the answer is malformed; its content is not examined.
    other: well formed and near the reference.
    hallucination: any other well-formed answer.

    Args:
        asked: what the task asks for and accepts; None for the question and its reference alone.

    Example:
        >>> text_error(Prediction("snowman blue"), "snowman", "What is the object in the image?")
        'instruction_unfollowing'
        >>> text_error(Prediction("blue snowman"), "snowman", "What is the object in the image?")
        'other'
    """
    rule = text_rules.first(Wrong(prediction, reference, instruction, asked or Asked()))
    return text_rules.RULES[rule][0]


def box_error(prediction: Prediction, overlap: float | None) -> str:
    """The error type of a wrong box.

    instruction_unfollowing where an image was generated or no box can be parsed, other where its IoU with the reference
    is at least ``NEAR``, else hallucination.

    Args:
        overlap: the IoU; None where no box can be parsed.
    """
    if overlap is None or prediction.image is not None:
        return "instruction_unfollowing"
    return "other" if overlap >= NEAR else "hallucination"


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
