"""A case: one answer that fell short, with all that a judge may know of it, and what the rules say of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy

from cnext.scoring.base import Prediction
from cnext.scoring.boxes import parse_box
from cnext.scoring.errors import box_error, image_error, text_error

KINDS = ("text", "box", "draw", "edit")
READ_FROM_IMAGE = "ocr_answer"
"""The scorer of answers that are read letter by letter and need not be words."""
_DRAWN = numpy.zeros((1, 1, 3), numpy.uint8)
SHORT_ANSWERS = ("short_answer", READ_FROM_IMAGE, "exact_answer", "contained_answer")


@dataclass(frozen=True)
class Case:
    """One answer that fell short. The judge sees nothing of stage, method or score.

    index: its place in the file of answers.  kind: one of ``KINDS``.  expected: "" where a picture is asked.
    drawn: the picture drawn, or None.  source, target: those that were read and that would have been right, or None.
    by_rule: the error type as the rules have it; a malformed answer is malformed beyond doubt, the rest is not.
    """

    stage: int
    task: str
    index: int
    id: str
    kind: str
    instruction: str
    expected: str
    answer: str
    drawn: Path | None
    source: Path | None
    target: Path | None
    by_rule: str

    @property
    def decided(self) -> bool:
        """Whether no model need be asked."""
        return self.by_rule == "instruction_unfollowing"

    @property
    def images(self) -> list[tuple[str, Path]]:
        """The pictures that the judge sees, each with what it is, in the order of the prompts."""
        shown = {
            "text": [("What the model was shown", self.source)],
            "box": [("What the model was shown", self.source)],
            "draw": [("What the model drew", self.drawn)],
            "edit": [
                ("The source", self.source),
                ("What the model drew", self.drawn),
                ("A picture that would have been right", self.target),
            ],
        }
        return [(title, path) for title, path in shown[self.kind] if path is not None]


def rule(
    scorer: str, text: str, drawn: bool, expected: str, instruction: str, known: Collection[str], scored: str
) -> str:
    """The error type of an answer that fell short, by rules alone.

    Args:
        scorer: a name that ``cnext.scoring.make_scorers`` gives.
        known: the words of the task's questions and references.
        scored: the error type that the scorer gave, which stands where the scorer is of another sort than these.
    """
    # The rules ask of a picture only whether there is one.
    prediction = Prediction(text, image=_DRAWN if drawn else None)
    if scorer in SHORT_ANSWERS:
        return text_error(prediction, expected, instruction, None if scorer == READ_FROM_IMAGE else known)
    if scorer == "box":
        return box_error(prediction, parsable=parse_box(text) is not None)
    if scorer in ("clip_text", "clip_image"):
        return image_error(prediction)
    return scored
