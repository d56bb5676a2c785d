"""A wrong answer as a judge sees it, and its error type by rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy

from cnext.scoring import BOXES, READ, SHORT_ANSWERS
from cnext.scoring.base import Prediction
from cnext.scoring.boxes import overlap_with, read_box
from cnext.scoring.errors import box_error, image_error, text_error
from cnext.scoring.text_rules import Asked

KINDS = ("text", "box", "draw", "edit")
"""Kinds of tasks, each with a prompt of its own: short answers, bounding boxes, text to image, image editing."""
_ANY_IMAGE = numpy.zeros((1, 1, 3), numpy.uint8)


@dataclass(frozen=True)
class Case:
    """One answer with a score below 100. The judge does not see stage, method or score.

    index: its line in the file of answers, from 0.  kind: one of ``KINDS``.  expected: "" where an image is asked for.
    generated: the model's image, or None.  source, target: the data set's input and reference images, or None.
    by_rule: the error type by rules; it is final for instruction unfollowing, the rest a judge may decide.
    """

    stage: int
    task: str
    index: int
    id: str
    kind: str
    instruction: str
    expected: str
    answer: str
    generated: Path | None
    source: Path | None
    target: Path | None
    by_rule: str

    @property
    def decided(self) -> bool:
        """Whether the rules decide, so that no model need be asked."""
        return self.by_rule == "instruction_unfollowing"

    @property
    def images(self) -> list[tuple[str, Path]]:
        """The images that the judge sees, (title, path), in the order that the prompt gives."""
        shown = {
            "text": [("What the model was shown", self.source)],
            "box": [("What the model was shown", self.source)],
            "draw": [("What the model drew", self.generated)],
            "edit": [
                ("The source", self.source),
                ("What the model drew", self.generated),
                ("A picture that would have been right", self.target),
            ],
        }
        return [(title, path) for title, path in shown[self.kind] if path is not None]


def asked_by(scorer: str, samples: Iterable[tuple[str, str]]) -> Asked:
    """What a task asks for and accepts, from (question, reference) of its samples."""
    return Asked.of(samples, read=scorer in READ)


def rule(scorer: str, text: str, generated: bool, expected: str, instruction: str, asked: Asked, scored: str) -> str:
    """The error type of a wrong answer by rules.

    Args:
        scorer: a name that ``cnext.scoring.make_scorers`` gives.
        generated: whether the answer has an image.
        asked: what the task asks for and accepts, as `asked_by` gives it.
        scored: the error type that the scorer gave; it is returned for scorers without rules here.
    """
    # The rules ask only whether there is an image.
    prediction = Prediction(text, image=_ANY_IMAGE if generated else None)
    if scorer in SHORT_ANSWERS:
        return text_error(prediction, expected, instruction, asked)
    if scorer in BOXES:
        reference = read_box(expected)
        return box_error(prediction, overlap_with(reference, text) if reference else None)
    if scorer in ("clip_text", "clip_image"):
        return image_error(prediction)
    return scored
