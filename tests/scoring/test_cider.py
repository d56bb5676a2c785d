"""CIDEr-D against an example worked out by hand, a plain reimplementation, and its limits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from math import exp, log, sqrt

import numpy
import pytest

from cnext.scoring import make_scorers
from cnext.scoring.base import Prediction
from cnext.scoring.cider import cider_d
from cnext.scoring.errors import error_shares
from cnext.tasks.base import Sample, Task, Turn

TASK = Task("captions", ("text", "image"), ("text",), "llava", "cider", "", "", "", "")


def test_an_example_by_hand() -> None:
    """Two items. "a" is in both, so its weight is log(2 / 2) = 0; every other gram is in one: w = log 2.

    Item 1, answer "a cat", reference "a cat sat". Single words: answer {cat: w}, reference {cat: w, sat: w}, so
    w w / (w sqrt(2) w) = 1 / sqrt(2). Pairs: answer {a cat: w}, reference {a cat: w, cat sat: w}, again 1 / sqrt(2).
    Longer runs: none in the answer, 0. One word fewer: exp(-1 / 72). Mean over four orders: exp(-1 / 72) / (2 sqrt(2)).
    Item 2, answer "dog dog", reference "a dog": {dog: 2w} with {dog: w} is clipped to w w / (2w w) = 1 / 2; no pair
    agrees; equal length. Mean: 1 / 8.
    """
    assert cider_d(["a cat", "dog dog"], [["a cat sat"], ["a dog"]]) == pytest.approx(
        [exp(-1 / 72) / (2 * sqrt(2)), 1 / 8], abs=1e-12
    )


def plain(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Dense vectors over all grams that occur anywhere."""

    def runs(text: str, n: int) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    scores = numpy.zeros(len(answers))
    for n in (1, 2, 3, 4):
        grams = sorted({g for text in itertools.chain(answers, *references) for g in runs(text, n)})
        frequency = [sum(any(g in runs(r, n) for r in accepted) for accepted in references) for g in grams]
        idf = numpy.array([log(len(answers)) - log(max(1, f)) for f in frequency])
        vector = lambda text: numpy.array([runs(text, n).count(g) for g in grams]) * idf  # noqa: B023, E731
        for item, (answer, accepted) in enumerate(zip(answers, references, strict=True)):
            for reference in accepted:
                a, r = vector(answer), vector(reference)
                norm = numpy.linalg.norm(a) * numpy.linalg.norm(r)
                gap = len(answer.split()) - len(reference.split())
                cosine = numpy.minimum(a, r) @ r / norm if norm else 0.0
                scores[item] += exp(-(gap**2) / 72) * cosine / len(accepted) / 4
    return scores.tolist()


def test_against_dense_vectors() -> None:
    rng = random.Random(0)

    def caption() -> str:
        return " ".join(rng.choices("a the red blue dog cat runs sits on mat".split(), k=rng.randint(0, 9)))

    answers = [caption() for _ in range(12)]
    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in answers]
    assert cider_d(answers, references) == pytest.approx(plain(answers, references), abs=1e-12)


def scored(*pairs: tuple[Prediction, tuple[str, ...]]) -> list:
    samples = [Sample(str(i), (Turn("?", said[0]),), references=said) for i, (_, said) in enumerate(pairs)]
    return make_scorers()["cider"](TASK, samples, [prediction for prediction, _ in pairs])


def test_both_profiles() -> None:
    """A caption equal to its reference but for case and punctuation has it all; published numbers are ten times."""
    words = ("A brown dog runs fast.", "Two cats sleep on mats.")
    right, drawn, empty = scored(
        (Prediction("a brown dog, runs fast"), words[:1]),
        (Prediction(words[1], numpy.zeros((2, 2, 3), numpy.uint8)), words[1:]),
        (Prediction(""), ("Five birds fly very high.",)),
    )
    assert (right.strict, right.paper, right.error) == (100.0, 1000.0, "")
    assert (drawn.strict, drawn.paper, drawn.error) == (0.0, 1000.0, "instruction_unfollowing")
    assert (empty.strict, empty.paper, empty.error) == (0.0, 0.0, "instruction_unfollowing")
    (off, _) = scored((Prediction("a brown dog sleeps"), words[:1]), (Prediction(words[1]), words[1:]))
    assert off.error == "other"
    assert 0 < off.strict < 100


def test_the_shares_of_errors_add_up() -> None:
    scores = scored(*((Prediction(text), ("a red dog runs",)) for text in ("a red dog runs", "a dog", "", "a red cat")))
    for profile in ("strict", "paper"):
        mean = sum(getattr(score, profile) for score in scores) / len(scores)
        assert sum(error_shares(scores, profile).values()) == pytest.approx(100 - mean)


def test_one_item_alone_scores_nothing() -> None:
    assert cider_d(["a dog runs fast"], [["a dog runs fast"]]) == [0.0]
