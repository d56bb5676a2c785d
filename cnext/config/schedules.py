"""Learning-rate schedules: functions of the recipe, the step (from 0) and the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from cnext.tasks.base import Recipe


def _cosine(recipe: Recipe, place: float, end: float) -> float:
    """Half a cosine from the full rate at ``warmup_steps`` to the minimum at ``end``."""
    done = (place - recipe.warmup_steps) / max(end - recipe.warmup_steps, 1)
    low = recipe.min_learning_rate_ratio
    return recipe.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def cosine(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps`` optimizer steps, then half a cosine to the minimum at the last."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    return _cosine(recipe, step, steps)


def released(recipe: Recipe, step: int, steps: int) -> float:
    """The schedule of the paper's code, which advances twice per optimizer step and past its end.

    With s = 2 step + 1 and T = steps + 1: rate s / warmup_steps below warmup_steps, else the cosine at s over T. The
    warm-up takes half its steps, the minimum is reached halfway, and the rate then rises to its start.

    Reference: the released training loop of arXiv 2602.18055, which steps its scheduler at every micro-batch of two.
    """
    place = 2 * step + 1
    if place < recipe.warmup_steps:
        return recipe.learning_rate * place / recipe.warmup_steps
    return _cosine(recipe, place, steps + 1)


SCHEDULES: dict[str, Callable[[Recipe, int, int], float]] = {"cosine": cosine, "released": released}
