"""MAGE-pull: mage-paper with a quadratic penalty to each task's start, weighted by earlier tasks' Fisher information.

Derivation. Near theta*, where the last task ended, the sum of the old tasks' losses is to second order
1/2 sum_j F_old,j (theta_j - theta*_j)^2, with F_old their summed Fisher information (Laplace's approximation, as in
EWC). Training on L_t + lambda/2 sum_j F_old,j (theta_j - theta*_j)^2 adds lambda F_old (theta - theta*) to each step's
gradient and stops where g = -lambda F_old (theta - theta*): a task may move far in directions that earlier tasks do not
need, and finds another solution. The merge afterwards cannot, as it interpolates on a line: per parameter it minimizes
1/2 F_t (x - theta_t)^2 + 1/(2 C) F_old (x - theta*)^2. After a pull it has less to correct, hence the large C.
F is that of `cnext.averaging.Pema`, with mean 1 in every task, so lambda is a ratio without unit. The first task, and
branches that no earlier task trained, are not pulled.

Reference: the project's own; Kirkpatrick et al., EWC, arXiv 1612.00796, and Continual-NExT, arXiv 2602.18055.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.methods.parts.penalties import pull_to_start


@dataclass
class MagePull(RoleBranches):
    """L = L_task + pull / 2 * sum of F_old (theta - theta*)^2 in every step, and MAGE's merge after the last."""

    scale: float = 3.0
    c: Annotated[float, "Plasticity of the merge, see mage-paper."] = 20.0
    pull: Annotated[float, "Weight lambda of the penalty; 0 is mage-paper."] = 0.09

    card = Card(
        "own; arXiv 2602.18055 and 1612.00796",
        keeps="the summed Fisher information",
        grid={"scale": (1.0, 3.0, 6.0), "pull": (0.003, 0.01, 0.03, 0.1)},
        grows={"pull": 2},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularizer = pull_to_start(self.rule, self.pull)
