"""Stratified samples of errors, confidence intervals of their shares, and agreement with known labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any

from cnext.judging.cases import Case
from cnext.scoring.base import ERROR_TYPES

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def stratified(cases: Sequence[Case], limit: int) -> list[Case]:
    """At most ``limit`` cases, taken in turn from every stage x task; within one, in an order by the hash of their ids.

    A larger limit adds to the sample of a smaller one, and every stage of a task has the same samples first.
    """
    strata: dict[tuple[int, str], list[Case]] = {}
    for case in cases:
        strata.setdefault((case.stage, case.task), []).append(case)
    ranked = [
        (place, number, case)
        for number, stratum in enumerate(strata.values())
        for place, case in enumerate(sorted(stratum, key=_rank))
    ]
    return [case for _, _, case in sorted(ranked, key=lambda item: item[:2])[:limit]]


def _rank(case: Case) -> bytes:
    return hashlib.sha256(f"{case.task}/{case.index}/{case.id}".encode("utf-8", "replace")).digest()


def wilson(hits: float, count: float) -> tuple[float, float]:
    """The 95% Wilson score interval of a share, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), within [0, 1].

    Args:
        count: the number of samples, or their effective number where weights differ.

    Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= hits <= count
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z * Z / count
    half = Z * sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = ((share + square / 2 + side * half) / (1 + square) for side in (-1, 1))
    # Exactly 0 and 1 at the ends, where rounding misses them.
    return (low if hits else 0.0), (high if hits < count else 1.0)


def agreement(known: Sequence[str], judged: Sequence[str | None]) -> dict[str, Any]:
    """Accuracy, Cohen's kappa, and precision and recall of each type over the judged cases; None where undefined.

    kappa = (p_o - p_e) / (1 - p_e), p_o the accuracy and p_e = Σ_c p_known(c) p_judged(c) that of chance.

    Args:
        judged: the error type of each case, None where it was not judged.

    Returns:
        accuracy, kappa, types {type: {precision, recall}}, confusion {known: {judged: count}}, judged and unjudged
        counts.

    Reference: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    pairs = [(label, found) for label, found in zip(known, judged, strict=True) if found is not None]
    counts, count = Counter(pairs), len(pairs)
    rows, columns = Counter(label for label, _ in pairs), Counter(found for _, found in pairs)
    accuracy = sum(counts[kind, kind] for kind in ERROR_TYPES) / count if count else None
    chance = sum(rows[kind] * columns[kind] for kind in ERROR_TYPES) / count**2 if count else 1.0
    return {
        "accuracy": accuracy,
        "kappa": None if accuracy is None or chance == 1.0 else (accuracy - chance) / (1 - chance),
        "types": {
            kind: {
                "precision": counts[kind, kind] / columns[kind] if columns[kind] else None,
                "recall": counts[kind, kind] / rows[kind] if rows[kind] else None,
            }
            for kind in ERROR_TYPES
        },
        "confusion": {label: {found: counts[label, found] for found in ERROR_TYPES} for label in ERROR_TYPES},
        "judged": count,
        "unjudged": len(known) - count,
    }
