"""Metrics of a score matrix as text: value, formula and divisor, and the input that missing ones need."""

from __future__ import annotations

from math import isnan

from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS, REFERENCE_FORMULAS, points, without_repeats
from cnext.scoring.matrix_file import ScoreRecord

LEARNT, ONWARDS = "each task's score when learnt", "each task's score after every stage from its own on"
AHEAD = "each task's score one stage before its own"
NEEDS: dict[str, tuple[str, ...]] = {
    f"{LEARNT}, and two stages": ("new_acc", "forgetting", "worst_forgetting"),
    f"{ONWARDS}, and two stages": ("maa", "forgetting_max", "recovery"),
    f"a zero-shot row, and {AHEAD}": ("fwt",),
    "each task's score after every stage before its own": ("transfer",),
    'JSON with "writes", {task: [modalities]}, and a task of this modality': ("avg_acc_text", "avg_acc_image"),
    f'JSON with "writes", and {LEARNT}, one of this modality before the last': ("forgetting_text", "forgetting_image"),
    f'JSON with "writes", and {ONWARDS}': ("forgetting_intermodal", "forgetting_intramodal"),
    f'JSON with "error_matrix", {{type: rows}} of {", ".join(ERROR_TYPES)}': ("avg_hal", "avg_iuf", "avg_oth"),
    f'JSON with "chance", a score a task, and {AHEAD}': ("fwt_chance",),
    f'JSON with "chance", and {LEARNT}, above chance': ("forgetting_relative",),
    'JSON with "chance" and "single", a score a task trained alone, above chance': ("transfer_relative",),
    f'JSON with "joint", a score a task after joint training, and {LEARNT}': ("intransigence",),
    f'JSON with "joint", and {ONWARDS}': ("omega",),
    'JSON with "held_out", {"before": [...], "after": [...]}': ("zero_shot_retention",),
}
"""The input of each metric beside a last row with a score on every task."""


def metrics_text(given: ScoreRecord) -> str:
    """Every metric with value, formula and divisor; then the missing ones with the input that they need."""
    found, formulas = given.metrics(), FORMULAS | REFERENCE_FORMULAS
    averages = ["-" if isnan(value) else points(value) for value in given.matrix.stage_averages()]
    width = max(map(len, found))
    lines = [
        f"T = {len(averages)} of {len(given.tasks)} stages; tasks: {', '.join(given.tasks)}",
        "R[t][i]: score in percent on task i after stage t; R[0][i]: zero-shot",
        "",
        *(
            f"{name:<{width}} {points(value):>7}  {formulas[name]}"
            for name in without_repeats(formulas, found)
            if (value := found[name]) is not None
        ),
        f"{'stage averages':<{width}} {' '.join(averages)}  a_t = (1/t) Σ_{{i<=t}} R[t][i]; divisor t",
    ]
    missing = {need: [name for name in names if found[name] is None] for need, names in NEEDS.items()}
    if any(missing.values()):
        lines += ["", "not computed, and the input that is missing:"]
        lines += [f"  {', '.join(names)}: {need}" for need, names in missing.items() if names]
    return "\n".join(lines)
