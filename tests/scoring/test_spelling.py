"""Texts that can be typed in several ways are one text to the strict profile, and stay as they are in `paper`."""

import unicodedata

import pytest

from cnext.scoring import make_scorers
from cnext.scoring.answers import contains_words, normalise, plain
from cnext.scoring.base import Prediction
from cnext.scoring.cider import cider_d
from cnext.scoring.errors import text_error
from cnext.scoring.text_rules import Asked
from cnext.tasks.base import Sample, Task, Turn

SCORERS = make_scorers()
SAME = {
    "decomposed": ("José Martínez", unicodedata.normalize("NFD", "José Martínez")),
    "decomposed, upper case": ("CRÈME", unicodedata.normalize("NFD", "crème")),
    "jamo": ("사과", unicodedata.normalize("NFD", "사과")),
    "decomposed by case folding": ("ǰ", "J\u030c"),
    "full-width digits": ("12", "\uff11\uff12"),
    "full-width letters and punctuation": ("Stop!", "\uff33\uff54\uff4f\uff50\uff01"),
    "full-width period": ("cat", "cat\uff0e"),
    "half-width katakana": ("ガス", "\uff76\uff9e\uff7d"),
    "ideographic full stop": ("cat", "cat\u3002"),
    "ideographic full stop for a period": ("はい.", "はい\u3002"),
    "half-width full stop": ("yes", "yes\uff61"),
    "full stop after a space": ("New York", "New York \u3002"),
    "ideographic space": ("New York", "New\u3000York"),
    "no-break space": ("New York", "New\u00a0York"),
    "curly apostrophe": ("don't stop", "don\u2019t stop"),
    "accent as apostrophe": ("don't stop", "don\u00b4t stop"),
    "curly quotes": ('"stop"', "\u201cstop\u201d"),
    "low quotes": ('"stop"', "\u201estop\u201c"),
    "soft hyphen": ("cooperate", "co\u00adoperate"),
    "zero-width space": ("cooperate", "co\u200boperate"),
    "byte order mark": ("stop", "\ufeffstop"),
    "mark of direction": ("stop", "stop\u200e"),
    "no-break hyphen": ("t-shirt", "t\u2011shirt"),
    "minus": ("-3", "\u22123"),
    "en dash": ("1990-95", "1990\u201395"),
}
DIFFERENT = [("102", "10²"), ("1/2", "½"), ("resume", "résumé"), ("O", "0"), ("نمیشود", "نمی\u200cشود")]


@pytest.mark.parametrize("scorer", ["short_answer", "ocr_answer", "exact_answer", "coin_gqa", "mllm_cl_fin"])
@pytest.mark.parametrize("pair", SAME.values(), ids=SAME.keys())
def test_one_text_typed_in_two_ways(scorer: str, pair: tuple[str, str]) -> None:
    for reference, said in (pair, pair[::-1]):
        sample = Sample("1", (Turn("Who wrote this book?", reference),))
        (score,) = SCORERS[scorer](None, [sample], [Prediction(said)])
        assert (score.strict, score.error) == (100, "")


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_other_texts_stay_different(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_paper_compares_texts_as_they_are() -> None:
    for name in ("decomposed", "full-width digits", "curly apostrophe", "soft hyphen"):
        reference, said = SAME[name]
        for scorer in ("ocr_answer", "exact_answer", "contained_answer"):
            (score,) = SCORERS[scorer](None, [Sample("1", (Turn("?", reference),))], [Prediction(said)])
            assert score.paper == 0, (name, scorer)


def test_plain_changes_nothing_else() -> None:
    for text in ("", "Stop. It's 10% (a-b)!", "über", "日本語", "ﬁ x² ½ ™", "👩‍🚀", "नमस्ते"):
        assert plain(text) == text


def test_the_type_of_an_error_does_not_depend_on_the_spelling() -> None:
    task = Asked.of([("What is it?", "é")])
    far, near = unicodedata.normalize("NFD", "café crème"), unicodedata.normalize("NFD", "crème")
    assert contains_words(far, "crème")
    assert text_error(Prediction(far), "crème", "What is it?") == "other"
    assert text_error(Prediction(near), "café crème", "What is it?") == "other"
    # A vowel with a loose accent is a vowel, and two loose accents are no words.
    assert text_error(Prediction(unicodedata.normalize("NFD", "é")), "ñandú", "What is it?", task) == (
        text_error(Prediction("é"), "ñandú", "What is it?", task)
    )


def test_captions() -> None:
    """Of captions equal but for their spelling, the strict score is that of equal captions, and `paper` is lower."""
    references = [["a café\u2019s corner in town"], ["two dogs run on grass"], ["a red bus in the city"]]
    said = [unicodedata.normalize("NFD", "a café's corner in town"), *(r[0] for r in references[1:])]
    assert cider_d(said, references) == pytest.approx([1, 1, 1])
    assert cider_d(said, references, str)[0] < 0.9
    samples = [Sample(str(i), (Turn("?", r[0]),)) for i, r in enumerate(references)]
    task = Task("captions", ("text", "image"), ("text",), "llava", "cider", "", "", "", "")
    scores = SCORERS["cider"](task, samples, [Prediction(text) for text in said])
    assert [score.strict for score in scores] == [100, 100, 100]
    assert [score.paper for score in scores][1:] == [1000, 1000]
    assert scores[0].paper < 900
