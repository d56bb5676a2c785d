"""One contract for all scorers, and what `check_scorer` says of faulty ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cnext.errors import UserError
from cnext.scoring.base import Score
from cnext.scoring.names import BOXES, OWN
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample, Turn
from cnext.testing import SCORER_CHECKS, check_backbone, check_method, check_scorer
from cnext.testing.scorers import REFERENCES, Material, material

CATEGORIES = {"mllm_cl_ocr": "Text Recognition"}


def samples_of(name: str, data: Path) -> Sequence[Sample] | None:
    """Samples of the kind that a scorer is for; None: the texts that `check_scorer` makes."""
    task = {"clip_text": "Flickr30k", "clip_image": "HQEdit"}.get(name)
    if task:
        return formats.read_samples(suites.load("next-tiny").task(task), data, "train")[:3]
    made = material(lambda answer, references: 1.0).samples
    if name == "coin_scienceqa":
        asked = "Which?\nA. one\nB. two"
        return [replace(made[0], turns=(Turn(asked, letter),), references=()) for letter in "AB"]
    if name == "coin_textvqa":
        return [replace(sample, references=sample.references[:1] * 10) for sample in made]
    return [replace(sample, category=CATEGORIES[name]) for sample in made] if name in CATEGORIES else None


@pytest.fixture(params=list(OWN))
def made(request: pytest.FixtureRequest, data: Path) -> Material:
    boxes = ["[0.10,0.20,0.30,0.40]", "[0.0,0.0,1.0,1.0]"]
    return material(request.param, boxes if request.param in BOXES else REFERENCES, samples_of(request.param, data))


@pytest.mark.parametrize("check", SCORER_CHECKS)
def test_keeps_the_contract(made: Material, check: str) -> None:
    SCORER_CHECKS[check](made)


def wrong_count(task, samples, predictions):
    return [Score(0.0, 0.0, "other")]


def no_percent(task, samples, predictions):
    return [Score(150.0, 0.0, "other") for _ in samples]


def no_error(task, samples, predictions):
    return [Score(50.0, 50.0) for _ in samples]


def always_right(answer, references):
    return True


FAULTS: dict[Callable, str] = {
    wrong_count: "expected a list of 4 scores, one per sample, of the scorer wrong_count, got 1",
    no_percent: "a strict score from 0 to 100 percent of the scorer no_percent, got 150.0 for the answer 'zebra'",
    no_error: "expected an error type of hallucination, .* of the scorer no_error, got '' with a strict score of 50.0",
    always_right: "the accepted answer 'red' scores 100.0, and 'zebra' 100.0; expected more",
    lambda answer, references: 7: "sample 0 is refused: |the reference .* is refused: expected a number from 0 to 1",
    lambda answer, references: references.clear() or answer == "red": "the accepted answer 'two blue rings' scores 0.0",
    lambda answer, references: (
        answer.split()[0] in references
    ): "IndexError: list index out of range, for the answer ''",
    lambda answer: 1.0: r"expected a scorer of \(answer, references\) or of \(task, samples, predictions\)",
}


@pytest.mark.parametrize("scorer", FAULTS, ids=lambda scorer: FAULTS[scorer][:30])
def test_check_scorer_says_what_is_wrong(scorer: Callable) -> None:
    references = ["red"] if "IndexError" in FAULTS[scorer] else REFERENCES
    with pytest.raises(AssertionError, match=FAULTS[scorer]):
        check_scorer(scorer, references)


def test_check_scorer_takes_a_name_a_place_and_a_function() -> None:
    check_scorer("exact_answer")
    check_scorer("cnext.scoring.text:short_answer")
    check_scorer(lambda answer, references: answer in references)


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(AssertionError, match="unknown scorer of task checked 'no-such'"):
        check_scorer("no-such")
    with pytest.raises(UserError, match="unknown method 'no-such'"):
        check_method("no-such")
    with pytest.raises(UserError, match="unknown backbone 'no-such'"):
        check_backbone("no-such")
