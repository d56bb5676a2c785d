"""MAGE-pull: MAGE in which every step is pulled to the task's start where old tasks need it, besides the merge.

Derivation. The sum of the old tasks' losses near theta*, where the last task ended, is to second order
1/2 sum_j F_old,j (theta_j - theta*_j)^2, F_old their summed Fisher information (Laplace's approximation, as in EWC).
Training on L_t + lambda/2 sum_j F_old,j (theta_j - theta*_j)^2 adds lambda F_old (theta - theta*) to each step's
gradient, so it stops where g = -lambda F_old (theta - theta*): a task may move far in what the old ones do not need,
and finds another solution, which the merge afterwards cannot, for it interpolates on a line. The merge minimises
1/2 F_t (x - theta_t)^2 + 1/(2 C) F_old (x - theta*)^2 per parameter; after a pull it has less to do, hence the large C.
F is that of cnext.averaging.pema, with mean 1 in every task, so lambda is a ratio without unit. The first task, and a
branch new to training, are not pulled.

Reference: the project's own; Kirkpatrick et al., EWC, arXiv 1612.00796, and Continual-NExT, arXiv 2602.18055.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cnext.averaging.pema import Pema
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.ewc import QuadraticPenalty
from cnext.methods.mage import Mage


@dataclass
class MagePull(Mage):
    """L = L_task + pull / 2 * sum of F_old (theta - theta*)^2 in every step, and MAGE's merge after the last."""

    pull: float = 0.01
    """Strength lambda of the pull; 0 is mage."""
    c: float = 20.0
    """Plasticity of the merge, as of mage."""

    card = Card("own; arXiv 2602.18055 and 1612.00796", keeps="the summed Fisher information")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pull < float("inf"):
            raise UserError(f"pull must be at least 0 and finite, got {self.pull}")
        if self.pull and not isinstance(self.rule, Pema):
            raise UserError(f"a pull takes its Fisher information from the average pema, got average {self.average}")

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.pull:
            return None
        assert isinstance(self.rule, Pema)
        slots = (self.rule.fisher_old, self.rule.theta_start)
        fisher, start = ([slot[name] for name in self.rule.parameters] for slot in slots)
        return QuadraticPenalty.apply(self.pull / 2, fisher, start, *self.rule.parameters.values())
