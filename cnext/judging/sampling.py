"""Judging a few of many: a stratified choice, and how sure a share of it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import sqrt

from cnext.judging.cases import Case

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def stratified(cases: Sequence[Case], limit: int) -> list[Case]:
    """At most ``limit`` cases, taken in turn from every stage x task, each in an order that only its id decides.

    A larger limit keeps what a smaller one chose, and a sample is chosen after one stage as after another.
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
    """The 95% interval of a share by Wilson's score, (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), from 0 to 1.

    Args: count: it may be the effective one of unequal parts.
    Reference: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= hits <= count
    if count == 0:
        return 0.0, 1.0
    share, square = hits / count, Z * Z / count
    half = Z * sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = ((share + square / 2 + side * half) / (1 + square) for side in (-1, 1))
    # Exactly 0 and 1 at the ends, where rounding misses them by a hair.
    return (low if hits else 0.0), (high if hits < count else 1.0)
