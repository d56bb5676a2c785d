"""Scorers of MLLM-CL's tasks whose released scripts have rules of their own.

In all of them `strict` is as in ``short_answer``, and `paper` is the script's rule on the answer without white space
around it, as the released programs write it. Only the text counts.

Reference: MLLM-CL, arXiv 2506.05453, github.com/bjzhb666/MLLM-CL, ``ETrain/Eval/LLaVA/CoIN``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnext.scoring.base import Flaw, Prediction, Score
from cnext.scoring.text import content_flaw, sample_scores, text_scores

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task

REFUSAL = "Unanswerable"
FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The category of OCRBench whose answers are compared with their case and without spaces."""
CHOICES = ("AI2D", "TQA", "VQA", "SciVerse")
"""What the names of images begin with, before the first "_", whose questions in Sci take an exact answer."""


def mllm_cl_rs_ad(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A word or phrase in the answer, 100 or 0: RS and AD.

    paper, lower-cased: a reference of several words is a substring of the answer. Of one word, periods removed, it is
    so where the answer is one word; else it must have a space before it, or a space, period or comma after it. An
    answer with "Unanswerable" in it is wrong.  Reference: ``eval_ai2d.py``.
    """

    def released(answer: str, reference: str) -> bool:
        said, word = answer.strip().lower(), reference.lower()
        if REFUSAL in answer:
            return False
        if " " in word:
            return word in said
        word = word.replace(".", "")
        bounded = (f" {word}", f"{word} ", f"{word}.", f"{word},") if " " in said else (word,)
        return any(form in said for form in bounded)

    return text_scores(samples, predictions, released)


def mllm_cl_sci(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Questions on diagrams, textbooks and maps: Sci.

    paper, lower-cased: equal where the image's name begins with one of ``CHOICES``. Of other images, which are maps:
    where the question has "Which states", the share of the reference's items between commas that are items of the
    answer; else whether the answer contains the reference. An answer with "Unanswerable" in it is wrong.
    Reference: ``eval_sci.py``.
    """

    def released(sample: Sample, answer: str) -> float:
        return max(_science(sample, answer, reference.lower()) for reference in sample.answers)

    return sample_scores(samples, predictions, released)


def _science(sample: Sample, answer: str, reference: str) -> float:
    said, image = answer.strip().lower(), sample.image.name if sample.image else ""
    if REFUSAL in answer:
        return 0.0
    if image.partition("_")[0] in CHOICES:
        return said == reference
    if "Which states" in sample.turns[0].instruction:
        items, named = reference.split(","), said.split(",")
        return sum(item in named for item in items) / len(items)
    return reference in said


def mllm_cl_fin(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """An option, or yes or no, 100 or 0: Fin.

    paper: lower-cased and without spaces and periods, the answer is the lower-cased reference. An answer with
    "Unanswerable" in it is wrong.  Reference: ``eval_finvis.py``.
    """

    def released(answer: str, reference: str) -> bool:
        said = answer.strip().lower().replace(" ", "").replace(".", "")
        return REFUSAL not in answer and said == reference.lower()

    return text_scores(samples, predictions, released)


def mllm_cl_vp(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A count or a relation, 100 or 0: VP.

    paper: lower-cased and without spaces, line breaks and periods, the reference is a substring of the answer.
    Reference: ``eval_sat.py``.
    """

    def bare(text: str) -> str:
        return text.lower().strip().replace(" ", "").replace("\n", "").replace(".", "")

    return text_scores(samples, predictions, lambda answer, reference: bare(reference) in bare(answer))


def mllm_cl_ocr(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Text read from an image, 100 or 0: OCR, which is tested on OCRBench.

    paper: lower-cased and without line breaks, the reference is a substring of the answer; where the row's
    "answer_type" is ``FORMULAS``, with case, and without spaces and line breaks.  Reference: ``eval_ocr.py``.
    """

    def released(sample: Sample, answer: str) -> bool:
        def form(text: str) -> str:
            bare = text.strip().replace("\n", "")
            return bare.replace(" ", "") if sample.category == FORMULAS else bare.lower()

        return any(form(reference) in form(answer) for reference in sample.answers)

    return sample_scores(samples, predictions, released, read=True)


def category_flaw(sample: Sample) -> Flaw | None:
    """Says that a row of OCR has an empty reference, or no category, so that it is not known to be a formula."""
    if (flaw := content_flaw(sample)) or sample.category:
        return flaw
    return Flaw(
        "lacks 'answer_type', the category of OCRBench: 'paper' scores it as words, not as a formula", usable=True
    )
