"""Base types of scoring: a model's prediction, and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnext.registry import Registry
from cnext.scoring import SHORT_ANSWERS

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


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a sample's reference. usable: whether a run may start, with scores that the text explains."""

    text: str
    usable: bool = False


REFERENCE_CHECKS = Registry(
    "check of references",
    "cnext.reference_checks",
    {
        **dict.fromkeys((*SHORT_ANSWERS, "cider"), "cnext.scoring.text:content_flaw"),
        "box": "cnext.scoring.boxes:reference_flaw",
        "clip_image": "cnext.scoring.images:target_flaw",
        "coin_grounding": "cnext.scoring.boxes:reference_flaw",
        "coin_scienceqa": "cnext.scoring.coin:option_flaw",
        "coin_textvqa": "cnext.scoring.coin:annotators_flaw",
        "mllm_cl_ocr": "cnext.scoring.mllm_cl:category_flaw",
    },
)
"""By the name of a scorer: a function from `Sample` to `Flaw` or None.

Another package adds one by an entry point of the group ``cnext.reference_checks``: ``scorer = "module:function"``.
"""


def reference_check(task: Task) -> Callable[[Sample], Flaw | None]:
    """The check of a task's test samples: what keeps a reference from being scored as the task's scorer needs it."""
    if task.scorer in REFERENCE_CHECKS:
        return REFERENCE_CHECKS[task.scorer]
    return lambda sample: None
