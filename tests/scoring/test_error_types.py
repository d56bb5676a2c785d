"""What shortfalls are booked to, and that the shares add up."""

import random

import numpy
import pytest

from cnext.scoring import make_scorers
from cnext.scoring.base import ERROR_TYPES, PROFILES, Prediction, Score
from cnext.scoring.errors import box_error, error_shares, image_error, text_error
from cnext.tasks.base import Sample, Turn

SCORERS = make_scorers()

IMAGE = numpy.zeros((4, 4, 3), numpy.uint8)


@pytest.mark.parametrize(
    ("text", "reference", "image", "error"),
    [
        ("blue", "red", None, "hallucination"),
        ("one two three four five", "red", None, "hallucination"),
        ("one two three four five six", "red", None, "instruction_unfollowing"),
        ("one two three four five six", "a title of six words here", None, "hallucination"),
        ("one two three four five six seven", "a title of six words here", None, "instruction_unfollowing"),
        ("", "red", None, "instruction_unfollowing"),
        (" . ", "red", None, "instruction_unfollowing"),
        ("no no no", "red", None, "instruction_unfollowing"),
        ("no no", "red", None, "hallucination"),
        ("blue", "red", IMAGE, "instruction_unfollowing"),
        ("red", "red", IMAGE, "instruction_unfollowing"),
        ("red circle", "red", None, "other"),
        ("red", "red circle", None, "other"),
        ("bored", "red", None, "hallucination"),
        ("it is plain that it is red", "red", None, "instruction_unfollowing"),
    ],
)
def test_text_error(text: str, reference: str, image: numpy.ndarray | None, error: str) -> None:
    assert text_error(Prediction(text, image), reference) == error


def test_box_and_image_errors() -> None:
    assert box_error(Prediction("[0,0,1,1]"), parsable=True) == "hallucination"
    assert box_error(Prediction("left"), parsable=False) == "instruction_unfollowing"
    assert box_error(Prediction("[0,0,1,1]", IMAGE), parsable=True) == "instruction_unfollowing"
    assert image_error(Prediction("a red circle")) == "instruction_unfollowing"
    assert image_error(Prediction("", IMAGE)) == "hallucination"


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer", "box"])
@pytest.mark.parametrize("profile", PROFILES)
def test_shares_of_random_answers_add_up(scorer: str, profile: str) -> None:
    draw = random.Random(0)
    answers = ["red", "a red", "", "red red red", "blue", "x", "red circle", "[0.1,0.1,0.9,0.9]", "[0.1,0.1,0.8,0.5]"]
    reference = "[0.1,0.1,0.9,0.85]" if scorer == "box" else "red"
    for _ in range(20):
        samples = [Sample("1", (Turn("?", reference),))] * 37
        predictions = [Prediction(draw.choice(answers), draw.choice([None, None, IMAGE])) for _ in samples]
        scores = SCORERS[scorer](None, samples, predictions)
        shares = error_shares(scores, profile)
        assert set(shares) == set(ERROR_TYPES)
        assert all(share >= 0 for share in shares.values())
        mean = sum(getattr(score, profile) for score in scores) / len(scores)
        assert sum(shares.values()) == pytest.approx(100 - mean, abs=1e-10)
        assert all(score.error in ERROR_TYPES if score.strict < 100 else score.error == "" for score in scores)


def test_shares_weigh_each_shortfall() -> None:
    scores = [Score(100.0, 0.0), Score(25.0, 25.0, "hallucination"), Score(0.0, 50.0, "instruction_unfollowing")]
    assert error_shares(scores) == {"hallucination": 25.0, "instruction_unfollowing": 100 / 3, "other": 0.0}
    assert error_shares(scores, "paper") == {"hallucination": 25.0, "instruction_unfollowing": 50 / 3, "other": 100 / 3}
