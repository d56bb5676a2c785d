"""What shortfalls are booked to, and that the shares add up."""

import random
import re
from pathlib import Path

import numpy
import pytest

from cnext.scoring import READ, make_scorers, text_rules
from cnext.scoring.base import ERROR_TYPES, PROFILES, Prediction, Score
from cnext.scoring.errors import box_error, error_shares, image_error, text_error
from cnext.scoring.text_rules import Asked, Wrong
from cnext.tasks.base import Sample, Turn

SCORERS = make_scorers()

IMAGE = numpy.zeros((4, 4, 3), numpy.uint8)


COLOR, COUNT, THING = "What color is the circle?", "How many objects are there?", "What is the object in the image?"
ASKED, WHERE, WORD = "Is there a red circle?", "Where is it?", "What word is written in the image?"
TASK = Asked.of(
    [(THING, name) for name in ("cup", "house", "hot dog", "ice")] + [("Is the tv on?", "yes"), (COUNT, "2")]
)
CASES = [
    ("empty", COLOR, " . ", "red"),
    ("long", COLOR, "one two three four five six", "red"),
    ("wrong", "Which book?", "one two three four five six", "a title of six words here"),
    ("loop", ASKED, "no no no", "yes"),
    ("echo", THING, "what is the object", "snowman"),
    ("echo", "What is it?", "What is it? A cat", "cat"),
    ("marks", THING, "[", "snowman"),
    ("marks", THING, "[0.6", "snowman"),
    ("marks", THING, ", cup", "snowman"),
    ("marks", THING, "<image>", "snowman"),
    ("wrong", "What does it say?", "[5", "[4"),
    ("wrong", "Which set is it?", "[1]", "[2]"),
    ("kind", COLOR, "jm", "red"),
    ("kind", COLOR, "fish", "red"),
    ("wrong", COLOR, "blue", "red"),
    ("wrong", "Which words?", "one two three four five", "red"),
    ("wrong", COLOR, "dark blue", "red"),
    ("wrong", COLOR, "stripes", "polka dots"),
    ("kind", COUNT, "fish", "2"),
    ("wrong", COUNT, "3", "2"),
    ("wrong", COUNT, "many", "2"),
    ("kind", ASKED, "fish", "yes"),
    ("wrong", ASKED, "no", "yes"),
    ("kind", THING, "yes", "snowman"),
    ("wrong", "Is it red or blue?", "no", "red"),
    ("wrong", "What is the answer?", "no", "not yes"),
    ("kind", THING, "[0.1,0.2,0.3,0.4]", "snowman"),
    ("kind", THING, "7", "snowman"),
    ("wrong", "What is on the sign?", "7", "stop"),
    ("kind", WORD, "cup red", "pea"),
    ("part", WORD, "the word pea", "pea"),
    ("wrong", "What words are written?", "cup fish", "pea"),
    ("no answer", THING, "and and", "snowman"),
    ("no answer", THING, "how", "snowman"),
    ("wrong", "Is the switch on or off?", "on", "off"),
    ("wrong", "Which way does it go?", "from", "to"),
    ("no word", THING, "djt", "snowman"),
    ("no word", THING, "fish k", "snowman"),
    ("no word", THING, "qa", "snowman"),
    ("wrong", THING, "tv", "snowman"),
    ("wrong", THING, "TV", "snowman"),
    ("wrong", THING, "nak", "snowman"),
    ("wrong", THING, "\N{CJK UNIFIED IDEOGRAPH-732B}", "snowman"),
    ("wrong", "Which one is it?", "a", "b"),
    ("wrong", "Which one is it?", "A", "C"),
    ("wrong", "Which one is it?", "d", "C."),
    ("wrong", "Which one is it?", "b", "A. dog"),
    ("wrong", "Which one is it?", "b", "(A) dog"),
    ("wrong", "Which way?", "N", "north"),
    ("no word", "Which way?", "e", "north"),
    ("wrong", "When?", "p.m.", "in the evening"),
    ("wrong", THING, "t-shirt", "snowman"),
    ("breaks off", THING, "boat a", "snowman"),
    ("breaks off", THING, "boat and", "snowman"),
    ("wrong", "Is the switch on or off?", "lights at", "a look at"),
    ("goes on", THING, "snowman circle", "snowman"),
    ("goes on", THING, "snowman blue", "snowman"),
    ("goes on", THING, "house blue", "snowman"),
    ("goes on", THING, "lamp blue", "snowman"),
    ("goes on", THING, "house and fish", "snowman"),
    ("goes on", THING, "ice box", "snowman"),
    ("wrong", THING, "traffic light", "snowman"),
    ("wrong", "What is he eating?", "ice cream", "cake"),
    ("goes on", COLOR, "red ring", "red"),
    ("goes on", COUNT, "2 fish", "2"),
    ("goes on", COUNT, "two fish", "2"),
    ("wrong", THING, "hot dog", "snowman"),
    ("wrong", THING, "blue house", "snowman"),
    ("wrong", "What shade is it?", "sky blue", "dark red"),
    ("part", COLOR, "red circle", "red"),
    ("part", COLOR, "Red it is.", "red"),
    ("part", ASKED, "yes it is", "yes"),
    ("part", COUNT, "two objects", "2"),
    ("form", THING, "snowmen", "snowman"),
    ("form", THING, "snow man", "snowman"),
    ("form", THING, '"snowman"', "snowman"),
    ("form", COUNT, "two", "2"),
    ("wrong", COUNT, "three", "2"),
    ("wrong", "How much is it?", "1 5", "15"),
    ("wrong", "How cold is it?", "-5", "5"),
    ("part", THING, "blue snowman", "snowman"),
    ("part", THING, "little snowman", "snowman"),
    ("part", THING, "circle", "red circle"),
    ("wrong", THING, "cup", "snowman"),
    ("wrong", THING, "bored", "red"),
]


@pytest.mark.parametrize(("rule", "question", "text", "reference"), CASES, ids=[f"{c[2]} for {c[3]}" for c in CASES])
def test_the_rule_that_decides(rule: str, question: str, text: str, reference: str) -> None:
    assert text_rules.first(Wrong(Prediction(text), reference, question, TASK)) == rule
    assert text_error(Prediction(text), reference, question, TASK) == text_rules.RULES[rule][0]
    assert text_error(Prediction(text, IMAGE), reference, question, TASK) == "instruction_unfollowing"


def test_every_rule_has_a_case_and_a_row_in_the_docs() -> None:
    assert {case[0] for case in CASES} | {"image"} == set(text_rules.RULES)
    short = {"instruction_unfollowing": "IUF", "other": "OTH", "hallucination": "HAL"}
    docs = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z ]+)`(?: †)? \| (IUF|OTH|HAL) \|", docs, re.MULTILINE)
    assert rows == [(name, short[kind]) for name, (kind, _) in text_rules.RULES.items()]


def test_letters_may_be_read_from_an_image() -> None:
    turns = (Turn("What does it say?", "dot"),)
    samples = [Sample("1", turns)]
    for scorer in READ:
        given = [Sample("1", turns, references=("dot",) * 10)] if scorer == "coin_textvqa" else samples
        for text in ("djt", "d", "dots", "pea red", "not", "edge of"):
            assert SCORERS[scorer](None, given, [Prediction(text)])[0].error == "hallucination", scorer
    assert SCORERS["short_answer"](None, samples, [Prediction("djt")])[0].error == "instruction_unfollowing"
    assert SCORERS["short_answer"](None, samples, [Prediction("dots")])[0].error == "other"


def test_without_a_task_words_are_not_doubted() -> None:
    assert text_error(Prediction("djt"), "dot", THING) == "hallucination"
    assert text_error(Prediction("house on fire"), "dot", THING) == "hallucination"
    assert text_error(Prediction("house on fire"), "dot", THING, TASK) == "instruction_unfollowing"


@pytest.mark.parametrize(
    ("word", "form"),
    [("dogs", "dog"), ("boxes", "box"), ("buses", "buse"), ("puppies", "puppy"), ("women", "woman"), ("feet", "foot"),
     ("bus", "bus"), ("glass", "glass"), ("this", "this"), ("glasses", "glass"), ("is", "is"), ("ninety", "90"),
     ("ties", "tie")],
)  # fmt: skip
def test_one_form_of_a_word(word: str, form: str) -> None:
    assert text_rules.alike(word) == form


def test_box_and_image_errors() -> None:
    assert box_error(Prediction("[0,0,1,1]"), 0.0999) == "hallucination"
    assert box_error(Prediction("[0,0,1,1]"), 0.1) == "other"
    assert box_error(Prediction("left"), None) == "instruction_unfollowing"
    assert box_error(Prediction("[0,0,1,1]", IMAGE), 0.9) == "instruction_unfollowing"
    samples = [Sample("1", (Turn("?", "[0,0,0.5,0.5]"),))] * 4
    said = [Prediction(text) for text in ("[0,0,0.3,0.3]", "[0.1,0.1,0.2,0.2]", "[0.6,0.6,0.9,0.9]", "[0,0,0.5]")]
    found = [score.error for score in SCORERS["box"](None, samples, said)]
    assert found == ["other", "hallucination", "hallucination", "instruction_unfollowing"]
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


def test_an_answer_that_is_formed_as_the_reference_is_not_malformed() -> None:
    """It ends with the same word that ends no phrase, or begins with the same words of the question."""
    assert not text_rules._breaks_off(Wrong(Prediction("grade b of a"), "blood group a", "", Asked()))
    assert text_rules._breaks_off(Wrong(Prediction("grade b of a"), "blood group", "", Asked()))
    asked = "what is it worth"
    assert not text_rules._is_the_question(Wrong(Prediction("what is it for"), "what is it then", asked, Asked()))
    assert text_rules._is_the_question(Wrong(Prediction("what is it for"), "it is then", asked, Asked()))
