"""Both profiles of the scorers of short answers, rule by rule."""

from collections.abc import Callable

import numpy
import pytest

from cnext.scoring import make_scorers
from cnext.scoring.answers import contains_words, normalise, repeats_a_word
from cnext.scoring.base import Prediction, Score
from cnext.tasks.base import Sample, Turn

SCORERS = make_scorers()

IMAGE = numpy.zeros((4, 4, 3), numpy.uint8)


def score(scorer: str, text: str, reference: str, image: numpy.ndarray | None = None) -> Score:
    sample = Sample("1", (Turn("What is it?", reference),))
    (result,) = SCORERS[scorer](None, [sample], [Prediction(text, image)])
    return result


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer", "exact_answer"])
def test_the_released_text_is_scored_by_the_papers_evaluators_alone(scorer: str) -> None:
    sample = Sample("1", (Turn("What is it?", "x < 3"),))
    (found,) = SCORERS[scorer](None, [sample], [Prediction("x < 3", None, "red")])
    assert (found.strict, found.paper) == (100, 100 if scorer == "exact_answer" else 0)
    (found,) = SCORERS[scorer](None, [sample], [Prediction("red", None, "x < 3")])
    assert (found.strict, found.paper) == (0, 0 if scorer == "exact_answer" else 100)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Cock.", "cock"),
        ("  Red \t Circle ", "red circle"),
        ("The  cat", "cat"),
        ("an apple.", "apple"),
        ("A", "a"),
        ("the", "the"),
        ("theory", "theory"),
        ("cat on a mat", "cat on a mat"),
        ("U.S.", "u.s"),
        ("end ..", "end ."),
        ("STRASSE", "strasse"),
        ("", ""),
        (".", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("text", "expected"),
    [("no no", False), ("no no no", True), ("No no no", False), ("a b a b a", True), ("", False)],
)
def test_repeats_a_word(text: str, expected: bool) -> None:
    assert repeats_a_word(text) is expected


def test_contains_words_matches_whole_words_in_a_row() -> None:
    assert contains_words("it is the Red.", "red")
    assert contains_words("C++ (language)", "(language)")
    assert not contains_words("bored", "red")
    assert not contains_words("red big circle", "red circle")
    assert not contains_words("anything", ".")


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer"])
@pytest.mark.parametrize(
    ("text", "reference", "strict", "paper"),
    [
        ("red", "red", 100, 100),
        ("RED.", "red", 100, 100),
        ("a red", "red", 100, 100),
        ("red", "Red.", 100, 100),
        ("blue", "red", 0, 0),
        ("", "red", 0, 100),
        ("   ", "red", 0, 100),
        ("a", "cat", 0, 100),
        ("2", "12", 0, 100),
        ("bored", "red", 0, 100),
        ("red circle", "red", 0, 100),
        ("red red red", "red", 0, 0),
        ("red red", "red", 0, 100),
        ("Red red red", "red", 0, 100),
        ("the cat", "a cat", 100, 0),
    ],
)
def test_profiles(scorer: str, text: str, reference: str, strict: float, paper: float) -> None:
    result = score(scorer, text, reference)
    assert (result.strict, result.paper) == (strict, paper)
    assert (result.error == "") == (strict == 100)


@pytest.mark.parametrize(
    ("text", "reference", "short", "ocr"),
    [
        ("Unanswerable", "Unanswerable", 100, 0),
        ("unanswerable", "Unanswerable", 100, 100),
        ("Unanswerable: cat", "cat", 100, 0),
    ],
)
def test_ocr_refuses_unanswerable_in_paper_only(text: str, reference: str, short: float, ocr: float) -> None:
    assert score("short_answer", text, reference).paper == short
    assert score("ocr_answer", text, reference).paper == ocr
    assert score("ocr_answer", text, reference).strict == score("short_answer", text, reference).strict


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer"])
def test_an_image_for_a_text_answer_is_wrong_in_strict_alone(scorer: str) -> None:
    assert score(scorer, "red", "red", IMAGE) == Score(0.0, 100.0, "instruction_unfollowing")


@pytest.mark.parametrize(("scorer", "upper_hit"), [("short_answer", 100), ("ocr_answer", 0)])
def test_short_answers_fold_upwards_and_ocr_downwards(scorer: str, upper_hit: float) -> None:
    assert score(scorer, "strasse", "Straße").paper == upper_hit


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_scorers_refuse_lists_of_different_length(name: str) -> None:
    scorer: Callable = SCORERS[name]
    with pytest.raises(ValueError, match="zip"):
        scorer(None, [Sample("1", (Turn("?", "[0,0,1,1]"),))], [])


@pytest.mark.parametrize(
    ("text", "reference", "strict", "exact", "contained"),
    [
        ("Red", "red", 100, 100, 100),
        ("red.", "red", 100, 0, 100),
        ("", "red", 0, 0, 0),
        ("it is Red", "red", 0, 0, 100),
        ("bored", "red", 0, 0, 100),
        ("re", "red", 0, 0, 0),
        ("a red", "red", 100, 0, 100),
    ],
)
def test_rules_of_other_suites(text: str, reference: str, strict: float, exact: float, contained: float) -> None:
    for scorer, paper in (("exact_answer", exact), ("contained_answer", contained)):
        result = score(scorer, text, reference)
        assert (result.strict, result.paper, result.error == "") == (strict, paper, strict == 100)


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer", "exact_answer", "contained_answer"])
def test_any_accepted_answer_will_do(scorer: str) -> None:
    sample = Sample("1", (Turn("How many?", "two"),), references=("two", "2"))
    (right, wrong) = SCORERS[scorer](None, [sample, sample], [Prediction("2"), Prediction("three")])
    assert (right.strict, right.paper, right.error) == (100, 100, "")
    assert (wrong.strict, wrong.paper, wrong.error) == (0, 0, "hallucination")
