"""Scorers of short textual answers: VQAv2 and ImageNet (`short_answer`), OCRVQA (`ocr_answer`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cnext.scoring.answers import normalise, repeats_a_word
from cnext.scoring.base import Prediction, Score
from cnext.scoring.errors import text_error

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task


def short_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A word or phrase against the reference, 100 or 0.

    strict: equal after ``normalise``, and no image drawn.
    paper: upper-cased and stripped, either string is a substring of the other (so an empty answer is a hit), unless
    a word occurs more than twice. Only the text counts.

    Reference: the released ``merge_vqav2.py`` and ``merge_imn.py``.
    """
    return [_score(*pair, str.upper) for pair in zip(samples, predictions, strict=True)]


def ocr_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Text read from an image against the reference, 100 or 0.

    strict: as ``short_answer``.
    paper: as ``short_answer`` but lower-cased, and an answer with "Unanswerable" in it, so capitalised, is wrong.

    Reference: the released ``merge_ocrvqa.py``.
    """
    return [_score(*pair, str.lower, refused="Unanswerable") for pair in zip(samples, predictions, strict=True)]


def _score(sample: Sample, prediction: Prediction, fold: Callable[[str], str], refused: str | None = None) -> Score:
    reference = sample.turns[0].answer
    hit = prediction.image is None and normalise(prediction.text) == normalise(reference)

    a, b = fold(prediction.text).strip(), fold(reference).strip()
    rejected = repeats_a_word(prediction.text) or (refused is not None and refused in prediction.text)
    paper_hit = not rejected and (a in b or b in a)

    error = "" if hit else text_error(prediction, reference)
    return Score(strict=100.0 * hit, paper=100.0 * paper_hit, error=error)
