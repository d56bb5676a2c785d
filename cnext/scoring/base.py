"""Base types of scoring: a model's prediction, and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

    from cnext.tasks.base import Sample, Task

PROFILES = ("strict", "paper")
"""strict (default): each score as it is defined. paper: the released evaluators, including their errors."""

ERROR_TYPES = ("hallucination", "instruction_unfollowing", "other")


@dataclass(frozen=True)
class Prediction:
    """A model's answer. text: decoded, without image tokens. image: (H, W, 3) uint8, or None if none was generated."""

    text: str
    image: numpy.ndarray | None = None


@dataclass(frozen=True)
class Score:
    """One answer's score in percent under each profile, and its error type.

    strict: 0 to 100. paper: may be negative, where a released evaluator takes a cosine as it is.
    error: one of ERROR_TYPES, or "" where the strict score is 100.
    """

    strict: float
    paper: float
    error: str = ""


Scorer = Callable[["Task", Sequence["Sample"], Sequence[Prediction]], list[Score]]
"""Scores a task's whole list of answers at once, in order; one Score per sample."""
