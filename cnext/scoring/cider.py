"""Scorer of captions: CIDEr-D, the similarity of an answer to several reference captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import exp, fsum, log, sqrt
from typing import TYPE_CHECKING

from cnext.scoring.answers import plain
from cnext.scoring.base import Prediction, Score

if TYPE_CHECKING:
    from cnext.tasks.base import Sample, Task

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
_WORD = re.compile(r"\w+(?:['-]\w+)*")

Grams = Counter[tuple[str, ...]]


def grams(text: str) -> dict[int, Grams]:
    """How often every run of 1 to 4 words occurs in a text: case folded, punctuation left out."""
    words = _WORD.findall(text.casefold())
    return {n: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in ORDERS}


def cider_d(
    answers: Sequence[str], references: Sequence[Sequence[str]], spelling: Callable[[str], str] = plain
) -> list[float]:
    """CIDEr-D of each answer without its factor of 10: 1 is an answer equal to each of its references.

    spelling: applied to every text first; ``str`` leaves texts as they are.

    For n-grams w of order n, with h(w) their count, f(w) the number of items with w in a reference, N items:
    g(w) = h(w) log(N / max(1, f(w)))
    s_n(c, r) = exp(-(|c| - |r|)^2 / (2 6^2)) sum_w min(g_c(w), g_r(w)) g_r(w) / (|g_c| |g_r|)
    and the mean over references and n = 1..4. N-grams of every item have no weight, so that one item alone scores
    0, and a caption of fewer than four words cannot reach 1.

    The words are those of ``grams`` and not of the Penn Treebank tokenizer, so that a score may differ in the third
    digit from that of the released package.

    Reference: Vedantam et al., CIDEr, arXiv 1411.5726, section 5.1.
    """
    counted = [[grams(spelling(reference)) for reference in accepted] for accepted in references]
    found = Counter(gram for accepted in counted for gram in {g for each in accepted for n in ORDERS for g in each[n]})
    items = len(answers)

    def weighted(counts: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * log(items / max(1, found[gram])) for gram, count in counts.items()}

    scores = []
    for answer, accepted in zip(answers, counted, strict=True):
        counts_of_answer = grams(spelling(answer))
        parts = []
        for reference in accepted:
            nearness = exp(-((counts_of_answer[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
            parts += [nearness * _clipped_cosine(weighted(counts_of_answer[n]), weighted(reference[n])) for n in ORDERS]
        scores.append(fsum(parts) / len(parts))
    return scores


def _clipped_cosine(answer: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    norms = sqrt(fsum(w * w for w in answer.values())) * sqrt(fsum(w * w for w in reference.values()))
    shared = fsum(min(answer[gram], weight) * weight for gram, weight in reference.items() if gram in answer)
    return shared / norms if norms else 0.0


def cider(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Captions by CIDEr-D over the list of answers.

    strict: 100 times ``cider_d``, 0 where an image was generated.
    paper: 100 times CIDEr-D with its factor of 10, of the texts as they are, as captioning papers print it, so up to
    1000; only the text counts. UCIT's ``eval_caption.py`` prints it too, and reports the mean of it and six others.
    """
    answers, accepted = [prediction.text for prediction in predictions], [sample.answers for sample in samples]
    of_plain = found = cider_d(answers, accepted)
    if any(plain(text) != text for texts in (answers, *accepted) for text in texts):
        found = cider_d(answers, accepted, str)
    scores = []
    for value, as_it_is, prediction in zip(map(_at_most_one, of_plain), found, predictions, strict=True):
        strict = 100.0 * value if prediction.image is None else 0.0
        unfollowed = prediction.image is not None or not prediction.text.strip()
        error = "" if strict == 100.0 else "instruction_unfollowing" if unfollowed else "other"
        scores.append(Score(strict=strict, paper=1000.0 * _at_most_one(as_it_is), error=error))
    return scores


def _at_most_one(value: float) -> float:
    """Rounding may put an answer equal to its references slightly above or below 1."""
    return 1.0 if value > 1 - 1e-12 else value
