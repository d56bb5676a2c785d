"""Scorer of bounding boxes (RefCOCO), with one parser per profile."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from cnext.scoring.answers import plain
from cnext.scoring.base import Flaw, Prediction, Score
from cnext.scoring.errors import box_error
from cnext.tasks.base import DataError

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task

Box = tuple[float, float, float, float]

# Unambiguous, so that matching takes linear time.
_NUMBER = r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_CORNER = rf"\({_NUMBER},{_NUMBER}\)"
# The last one may be cut off, as where an answer ends at the most tokens.
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}(?:\)|\Z)")
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]|{_CORNER}\s*,\s*{_CORNER}")


def read_box(text: str) -> Box | None:
    """The one [x1,y1,x2,y2] or (x1,y1),(x2,y2) in a text; None where there is none, or more than one.

    Words around the box and exponents (1e-05) are allowed. The corners may be in any order. Of three corners or more,
    as of a polygon, none make a box.
    """
    spelled = plain(text)
    found = _BOX.findall(spelled)
    if len(found) != 1 or (found[0][-1] and len(_CORNERS.findall(spelled)) != 2):
        return None
    x1, y1, x2, y2 = (float(number) for number in found[0] if number)
    return (x1, y1, x2, y2) if all(map(isfinite, (x1, y1, x2, y2))) else None


def has_area(box: Box) -> bool:
    """Whether x1 < x2 and y1 < y2."""
    return box[0] < box[2] and box[1] < box[3]


def parse_box(text: str) -> Box | None:
    """The one box in a text as ``read_box`` reads it, if it has an area, x1 < x2 and y1 < y2; None otherwise."""
    found = read_box(text)
    return found if found and has_area(found) else None


def parse_box_as_released(text: str) -> Box | None:
    """The box as the released evaluator reads it, which loses the first and the last digit.

    After the brackets are removed the first and the last character go too: "[0.27,0.42,0.83,0.73]" is read as
    (.27, .42, .83, .7), a leading "1.00" as .00, and a last "0.7" as 0. Reference: ``merge_grounding.py``.
    """
    return _inner_numbers(text.strip().translate(str.maketrans("", "", "[]()")))


def parse_box_as_coin(text: str) -> Box | None:
    """The box as CoIN's evaluator reads it: as ``parse_box_as_released``, but round brackets are not removed first.

    So "(0.27,0.42,0.83,0.73)" is read in full. Reference: ``eval_grounding.py``.
    """
    return _inner_numbers(text.strip().translate(str.maketrans("", "", "[]")))


def _inner_numbers(text: str) -> Box | None:
    """Four numbers between commas, without the first and the last character."""
    try:
        numbers = tuple(float(part) for part in text[1:-1].split(","))
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


def overlap_with(reference: Box, text: str) -> float | None:
    """The IoU of the one box in a text with a reference, 0 where that has no area; None where there is no such box."""
    answer = parse_box(text)
    if answer is None:
        return None
    return iou(answer, reference) if has_area(reference) else 0.0


def _expected(reference: str) -> str:
    return f"expected a reference box [x1,y1,x2,y2] with x1 < x2 and y1 < y2, got {reference!r}"


def reference_flaw(sample: Sample) -> Flaw | None:
    """What is wrong with the reference: it is no box, or it has no area, so that no answer is right."""
    reference = sample.turns[0].answer
    found = read_box(reference)
    if found is None:
        return Flaw(f"{_expected(reference)}; correct the file or remove the sample")
    if not has_area(found):
        consequence = "which has no area, so that every answer scores 0; correct the file"
        return Flaw(f"{_expected(reference)}, {consequence}", usable=True)
    return None


def box(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A bounding box against the reference box, 100 or 0.

    strict: ``parse_box`` finds a box with IoU >= 0.5, and no image was generated.
    paper: ``parse_box_as_released``, both boxes in pixels of the padded square, IoU > 0.5. Only the text counts.
    A reference without area scores 0.

    Raises:
        DataError: a sample's reference is not one box.
    """
    return _scores(samples, predictions, lambda prediction: parse_box_as_released(prediction.as_released))


def coin_grounding(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A bounding box against the reference box, 100 or 0, by CoIN's script.

    strict: as ``box``.  paper: as ``box``, by ``parse_box_as_coin``.

    Reference: CoIN, arXiv 2403.08350, ``eval_grounding.py``.
    """
    return _scores(samples, predictions, lambda prediction: parse_box_as_coin(prediction.text))


def _scores(
    samples: Sequence[Sample], predictions: Sequence[Prediction], released: Callable[[Prediction], Box | None]
) -> list[Score]:
    return [_score(sample, prediction, released) for sample, prediction in zip(samples, predictions, strict=True)]


def _score(sample: Sample, prediction: Prediction, released: Callable[[Prediction], Box | None]) -> Score:
    reference = read_box(sample.turns[0].answer)
    if reference is None:
        where = sample.origin or sample.id
        raise DataError(f"{where}: {_expected(sample.turns[0].answer)}; correct the file or remove the sample")
    overlap = overlap_with(reference, prediction.text)
    hit = prediction.image is None and (overlap or 0.0) >= 0.5

    found = released(prediction)
    # The common scale cancels in IoU but for rounding, which decides boxes at exactly one half.
    side = max(sample.size) if sample.size else 1
    paper_hit = found is not None and iou(_scaled(found, side), _scaled(reference, side)) > 0.5

    error = "" if hit else box_error(prediction, overlap)
    return Score(strict=100.0 * hit, paper=100.0 * paper_hit, error=error)


def _scaled(box: Box, side: int) -> Box:
    return (box[0] * side, box[1] * side, box[2] * side, box[3] * side)
