"""Scorers of CoIN's tasks whose released scripts have rules of their own.

In all of them `strict` is as in ``short_answer``, and `paper` is the script's rule on the answer without white space
around it, as the released programs write it. Only the text counts.

Reference: CoIN, arXiv 2403.08350, github.com/zackschen/CoIN, ``ETrain/Eval/LLaVA/CoIN``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnext.scoring.answers import normalise
from cnext.scoring.base import Flaw, Prediction, Score
from cnext.scoring.text import content_flaw, sample_scores, text_scores
from cnext.scoring.vqa_accuracy import ANNOTATORS, soft_accuracy
from cnext.tasks.base import DataError

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task

OPTIONS = "ABCDE"
_ONE_CHARACTER = re.compile(r"\b(\w)\b")
_OPTION = re.compile(r"\s*(\(?[A-E]\)?\.?\s*\Z|[A-E]\. )")


def coin_scienceqa(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """The letter of an option, 100 or 0: ScienceQA.

    paper: ``option_letter`` of the answer is that of the reference. Reference: ``eval_science_qa.py``.
    """

    def released(answer: str, reference: str) -> bool:
        letter = option_letter(answer)
        return bool(letter) and letter == option_letter(reference)

    return text_scores(samples, predictions, released)


def option_letter(text: str) -> str:
    """The option that an answer names: a letter A to E alone or before ". ", else its first word of one character.

    Upper-cased; "" if there is none. "The answer is C." gives C, but "a cat: C" gives A.
    """
    answer = text.strip()
    if answer[:1] in OPTIONS and answer[1:3] in ("", ". "):
        return answer[:1]
    found = _ONE_CHARACTER.search(answer)
    return found[1].upper() if found else ""


def option_flaw(sample: Sample) -> Flaw | None:
    """Says that the reference of ScienceQA names no option."""
    reference = sample.turns[0].answer
    if _OPTION.match(reference):
        return None
    return Flaw(f"expected the letter of an option, A to E, as the answer, got {reference!r}; correct the file")


def coin_textvqa(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Text in a photograph against the answers of ten people: TextVQA.

    strict: one of the ten is equal to the answer, as in ``short_answer``.
    paper: ``soft_accuracy``, from 0 to 100. Reference: ``eval_textvqa.py`` and ``m4c_evaluator.py``.

    Raises:
        DataError: a sample has not ten answers.
    """

    def released(sample: Sample, answer: str) -> float:
        if flaw := annotators_flaw(sample):
            raise DataError(f"{sample.origin or sample.id}: {flaw.text}")
        return soft_accuracy(answer, sample.answers)

    return sample_scores(samples, predictions, released, read=True)


def annotators_flaw(sample: Sample) -> Flaw | None:
    """Says that a sample of TextVQA has not the answers of ten people, of whom some may have written nothing."""
    count = len(sample.answers)
    if count == ANNOTATORS:
        return None if any(map(normalise, sample.answers)) else content_flaw(sample)
    return Flaw(f"expected the answers of {ANNOTATORS} people, of TextVQA_0.5.1_val.json or as a list, got {count}")


def coin_imagenet(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """The name of an object, 100 or 0: ImageNet.

    paper: either string is a substring of the other, with its case, so that an empty answer is right.
    Reference: ``eval_ImagetNet.py``.
    """

    def released(answer: str, reference: str) -> bool:
        return reference in answer.strip() or answer.strip() in reference

    return text_scores(samples, predictions, released)


def coin_gqa(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """A word or phrase, 100 or 0: GQA.

    paper: the answer, lower-cased and without periods at its end, is the reference with its case.
    Reference: ``convert_gqa_for_eval.py`` and the accuracy of ``eval_gqa.py``.
    """
    return text_scores(samples, predictions, lambda answer, reference: answer.strip().rstrip(".").lower() == reference)


def coin_ocrvqa(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Text on a book's cover, 100 or 0: OCR-VQA.

    paper: equal when lower-cased, and an answer with "Unanswerable" in it, so capitalised, is wrong.
    Reference: ``eval_ocrvqa.py``.
    """

    def released(answer: str, reference: str) -> bool:
        return "Unanswerable" not in answer and answer.strip().lower() == reference.lower()

    return text_scores(samples, predictions, released, read=True)
