"""Scorer of bounding boxes (RefCOCO), with one parser per profile."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnext.scoring.base import Prediction, Score
from cnext.scoring.errors import box_error
from cnext.tasks.base import DataError

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task

Box = tuple[float, float, float, float]

# Unambiguous, so that matching takes linear time.
_NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")


def parse_box(text: str) -> Box | None:
    """The one [x1,y1,x2,y2] in a text, with x1 < x2 and y1 < y2; None where there is none, or more than one.

    Words around the box are allowed.
    """
    found = _BOX.findall(text)
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = map(float, found[0])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def parse_box_as_released(text: str) -> Box | None:
    """The box as the released evaluator reads it, which loses the first and the last digit.

    After the brackets are removed the first and the last character go too: "[0.27,0.42,0.83,0.73]" is read as
    (.27, .42, .83, .7), a leading "1.00" as .00, and a last "0.7" as 0. Reference: ``merge_grounding.py``.
    """
    bare = text.strip().translate(str.maketrans("", "", "[]()"))
    try:
        numbers = tuple(float(part) for part in bare[1:-1].split(","))
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union, area(a and b) / area(a or b); 0 where the union has no area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def box(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A bounding box against the reference box, 100 or 0.

    strict: ``parse_box`` finds a box with IoU >= 0.5, and no image was generated.
    paper: ``parse_box_as_released``, both boxes in pixels of the padded square, IoU > 0.5. Only the text counts.

    Raises:
        DataError: a sample's reference is not one box.
    """
    return [_score(sample, prediction) for sample, prediction in zip(samples, predictions, strict=True)]


def _score(sample: Sample, prediction: Prediction) -> Score:
    reference = parse_box(sample.turns[0].answer)
    if reference is None:
        raise DataError(
            f"{sample.origin or sample.id}: expected a reference box [x1,y1,x2,y2] with x1 < x2 and y1 < y2, "
            f"got {sample.turns[0].answer!r}; correct the file or remove the sample"
        )
    answer = parse_box(prediction.text)
    hit = prediction.image is None and answer is not None and iou(answer, reference) >= 0.5

    released = parse_box_as_released(prediction.text)
    # The common scale cancels in IoU but for rounding, which decides boxes at exactly one half.
    side = max(sample.size) if sample.size else 1
    paper_hit = released is not None and iou(_scaled(released, side), _scaled(reference, side)) > 0.5

    error = "" if hit else box_error(prediction, parsable=answer is not None)
    return Score(strict=100.0 * hit, paper=100.0 * paper_hit, error=error)


def _scaled(box: Box, side: int) -> Box:
    return (box[0] * side, box[1] * side, box[2] * side, box[3] * side)
