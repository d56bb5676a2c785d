"""Scorer of captions: CIDEr-D, the similarity of an answer to several reference captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, fsum, log, sqrt
from typing import TYPE_CHECKING

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


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer without its factor of 10: 1 is an answer equal to each of its references.

    For n-grams w of order n, with h(w) their count, f(w) the number of items with w in a reference, N items:
    g(w) = h(w) log(N / max(1, f(w)))
    s_n(c, r) = exp(-(|c| - |r|)^2 / (2 6^2)) sum_w min(g_c(w), g_r(w)) g_r(w) / (|g_c| |g_r|)
    and the mean over references and n = 1..4. N-grams of every item have no weight, so that one item alone scores
    0, and a caption of fewer than four words cannot reach 1.

    The words are those of ``grams`` and not of the Penn Treebank tokenizer, so that a score may differ in the third
    digit from that of the released package.

    Reference: Vedantam et al., CIDEr, arXiv 1411.5726, section 5.1.
    """
    counted = [[grams(reference) for reference in accepted] for accepted in references]
    found = Counter(gram for accepted in counted for gram in {g for each in accepted for n in ORDERS for g in each[n]})
    items = len(answers)

    def weighted(counts: Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * log(items / max(1, found[gram])) for gram, count in counts.items()}

    scores = []
    for answer, accepted in zip(answers, counted, strict=True):
        said = grams(answer)
        parts = []
        for reference in accepted:
            nearness = exp(-((said[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
            parts += [nearness * _clipped_cosine(weighted(said[n]), weighted(reference[n])) for n in ORDERS]
        scores.append(fsum(parts) / len(parts))
    return scores


def _clipped_cosine(answer: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    norms = sqrt(fsum(w * w for w in answer.values())) * sqrt(fsum(w * w for w in reference.values()))
    shared = fsum(min(answer[gram], weight) * weight for gram, weight in reference.items() if gram in answer)
    return shared / norms if norms else 0.0


def cider(task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """Captions by CIDEr-D over the list of answers.

    strict: 100 times ``cider_d``, 0 where an image was generated.
    paper: 100 times CIDEr-D with its factor of 10, as captioning papers print it, so up to 1000; only the text counts.
    """
    found = cider_d([prediction.text for prediction in predictions], [sample.answers for sample in samples])
    scores = []
    for value, prediction in zip(found, predictions, strict=True):
        # Rounding may put an answer equal to its references slightly above or below 1.
        value = 1.0 if value > 1 - 1e-12 else value
        strict = 100.0 * value if prediction.image is None else 0.0
        unfollowed = prediction.image is not None or not prediction.text.strip()
        error = "" if strict == 100.0 else "instruction_unfollowing" if unfollowed else "other"
        scores.append(Score(strict=strict, paper=1000.0 * value, error=error))
    return scores
