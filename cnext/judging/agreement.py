"""How far a judge agrees with labels that are known: accuracy, Cohen's kappa, confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cnext.scoring.base import ERROR_TYPES


def agreement(known: Sequence[str], judged: Sequence[str | None]) -> dict[str, Any]:
    """Agreement over the cases that were judged; None where it is undefined.

    kappa = (p_o - p_e) / (1 - p_e), p_o the accuracy and p_e = Σ_c p_known(c) p_judged(c) that of chance.

    Args:
        judged: the error type of each case, None where it was not judged.

    Returns:
        accuracy, kappa, confusion {known: {judged: count}}, judged and unjudged counts.

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
        "confusion": {label: {found: counts[label, found] for found in ERROR_TYPES} for label in ERROR_TYPES},
        "judged": count,
        "unjudged": len(known) - count,
    }
