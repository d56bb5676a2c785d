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


COLOR, COUNT, THING = "What color is the circle?", "How many objects are there?", "What is the object in the image?"
ASKED = "Is there a red circle?"


@pytest.mark.parametrize(
    ("instruction", "text", "reference", "error"),
    [
        (COLOR, "jm", "red", "instruction_unfollowing"),
        (COLOR, "fish", "red", "instruction_unfollowing"),
        (COLOR, "blue", "red", "hallucination"),
        (COLOR, "dark blue", "red", "hallucination"),
        (COLOR, "red circle", "red", "other"),
        (COLOR, "stripes", "polka dots", "hallucination"),
        (COUNT, "fish", "2", "instruction_unfollowing"),
        (COUNT, "3", "2", "hallucination"),
        (COUNT, "two", "2", "hallucination"),
        (COUNT, "many", "2", "hallucination"),
        (ASKED, "fish", "yes", "instruction_unfollowing"),
        (ASKED, "no", "yes", "hallucination"),
        (ASKED, "yes it is", "yes", "other"),
        (THING, "yes", "snowman", "instruction_unfollowing"),
        (THING, "snowman blue", "snowman", "instruction_unfollowing"),
        (THING, "blue snowman", "snowman", "other"),
        (THING, "little snowman", "snowman", "other"),
        (THING, "[0.1,0.2,0.3,0.4]", "snowman", "instruction_unfollowing"),
        (THING, "djt", "snowman", "instruction_unfollowing"),
        (THING, "[ a", "snowman", "instruction_unfollowing"),
        (THING, "[", "snowman", "instruction_unfollowing"),
        (THING, "7", "snowman", "hallucination"),
        (THING, "\N{CJK UNIFIED IDEOGRAPH-732B}", "snowman", "hallucination"),
        ("Which one is it?", "a", "b", "hallucination"),
        ("Which one is it?", "b", "A. dog", "hallucination"),
        ("Which one is it?", "b", "(A) dog", "hallucination"),
        ("Which way?", "N", "north", "hallucination"),
        ("Which way?", "e", "north", "instruction_unfollowing"),
        ("When?", "p.m.", "in the evening", "hallucination"),
        (THING, "cup", "snowman", "hallucination"),
        (THING, "tv", "snowman", "hallucination"),
        (THING, "TV", "snowman", "hallucination"),
        ("Is it red or blue?", "no", "red", "hallucination"),
        ("What is the answer?", "no", "not yes", "hallucination"),
    ],
)
def test_answers_of_another_kind(instruction: str, text: str, reference: str, error: str) -> None:
    assert text_error(Prediction(text), reference, instruction, {"tv", "cup"}) == error


def test_letters_may_be_read_from_an_image() -> None:
    assert text_error(Prediction("djt"), "dot", THING) == "hallucination"
    samples = [Sample("1", (Turn("What word is written in the image?", "dot"),))]
    assert SCORERS["ocr_answer"](None, samples, [Prediction("djt")])[0].error == "hallucination"
    assert SCORERS["ocr_answer"](None, samples, [Prediction("d")])[0].error == "hallucination"
    assert SCORERS["short_answer"](None, samples, [Prediction("djt")])[0].error == "instruction_unfollowing"


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
