"""Scorers of short text answers: `short_answer` and `ocr_answer` of the benchmark, and those of other suites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cnext.scoring.answers import normalise, repeats_a_word
from cnext.scoring.base import Flaw, Prediction, Score
from cnext.scoring.errors import text_error
from cnext.scoring.text_rules import Asked

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task


def short_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A word or phrase against the reference, 100 or 0: VQAv2 and ImageNet.

    strict: equal after ``normalise``, and no image generated.
    paper: upper-cased and stripped, either string is a substring of the other (so an empty answer is a hit), unless
    a word occurs more than twice. Only the text counts.

    Reference: the released ``merge_vqav2.py`` and ``merge_imn.py``.
    """

    def released(answer: str, reference: str) -> bool:
        a, b = answer.upper().strip(), reference.upper().strip()
        return not repeats_a_word(answer) and (a in b or b in a)

    return text_scores(samples, predictions, released, as_released=True)


def ocr_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Text read from an image against the reference, 100 or 0: OCRVQA.

    strict: as ``short_answer``.
    paper: as ``short_answer`` but lower-cased, and an answer with "Unanswerable" in it, so capitalised, is wrong.

    Reference: the released ``merge_ocrvqa.py``.
    """

    def released(answer: str, reference: str) -> bool:
        a, b = answer.lower().strip(), reference.lower().strip()
        return not repeats_a_word(answer) and "Unanswerable" not in answer and (a in b or b in a)

    return text_scores(samples, predictions, released, read=True, as_released=True)


def exact_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A word or phrase against the reference, 100 or 0: CoIN's VQAv2 and VizWiz, and UCIT's tasks but for captions.

    strict: as ``short_answer``.  paper: equal when upper-cased. Only the text counts.

    Reference: CoIN, arXiv 2403.08350, ``eval_vqav2.py`` and ``eval_vizwiz.py``; UCIT, arXiv 2503.12941,
    ``eval_deepseek_r1.py``.
    """
    return text_scores(samples, predictions, lambda answer, reference: answer.strip().upper() == reference.upper())


def contained_answer(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Whether the answer contains the reference, 100 or 0: MLLM-CL's Med.

    strict: as ``short_answer``.  paper: lower-cased, the reference is a substring of the answer, and an answer with
    "Unanswerable" in it, so capitalised, is wrong. Only the text counts.

    Reference: MLLM-CL, arXiv 2506.05453, ``eval_pvqa.py``.
    """

    def released(answer: str, reference: str) -> bool:
        return "Unanswerable" not in answer and reference.lower() in answer.strip().lower()

    return text_scores(samples, predictions, released)


Rule = Callable[[str, str], float]
"""What a released evaluator gives an answer against one reference, from 0 to 1."""


def text_scores(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    released: Rule,
    read: bool = False,
    as_released: bool = False,
) -> list[Score]:
    """Scores by the strict and by a released rule; of several accepted answers the best counts.

    read: whether answers are read from an image letter by letter, and need not be words.
    as_released: whether the rule sees answers as the paper's code decodes them, see `Prediction`.
    """

    def best(sample: Sample, answer: str) -> float:
        return max(released(answer, reference) for reference in sample.answers)

    return sample_scores(samples, predictions, best, read, as_released)


def sample_scores(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    released: Callable[[Sample, str], float],
    read: bool = False,
    as_released: bool = False,
) -> list[Score]:
    """As `text_scores`, with a released rule that sees the whole sample."""
    asked = Asked.of(((sample.turns[0].instruction, sample.answers[0]) for sample in samples), read)
    scores = []
    for sample, prediction in zip(samples, predictions, strict=True):
        accepted, said = sample.answers, normalise(prediction.text)
        hit = prediction.image is None and bool(said) and said in map(normalise, accepted)
        error = "" if hit else text_error(prediction, accepted[0], sample.turns[0].instruction, asked)
        seen = prediction.as_released if as_released else prediction.text
        scores.append(Score(strict=100.0 * hit, paper=100.0 * released(sample, seen), error=error))
    return scores


def content_flaw(sample: Sample) -> Flaw | None:
    """Says that a reference has nothing in it to be compared: it is empty, or white space and a period alone."""
    empty = [answer for answer in sample.answers if not normalise(answer)]
    if not empty:
        return None
    return Flaw(f"expected a reference with a word or number in it, got {empty[0]!r}; correct the file")
