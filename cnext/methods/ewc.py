"""EWC: LoRA with a quadratic penalty towards the last task's end, weighted by the summed Fisher information.

    L = L_task + penalty * sum over parameters of F (theta - theta_old)^2

F is the sum over earlier tasks of F_t, the mean squared gradient of the task's own loss over the second half of its
steps, divided by its mean over the parameters; theta_old is where the last task ended. `cnext.averaging.Pema` keeps
both; with c infinite its merge leaves the parameters as they are. The paper computes F_t at the end of training and
keeps an anchor per task; with the sum and the latest anchor, memory does not grow. In the public implementation for
this benchmark the penalty reads the parameters' data and therefore has no gradient.

Reference: Kirkpatrick et al., arXiv 1612.00796; for the running sum, Schwarz et al., arXiv 1805.06370.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from cnext.averaging import Pema
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank
from cnext.methods.parts.penalties import FisherPenalty


@dataclass
class Ewc(LowRank):
    """y = W x + scale B A x."""

    scale: float = 6.0
    penalty: Annotated[float, "Weight of the quadratic penalty; F has mean 1 per task, for any scale of loss."] = 0.108

    card = Card(
        "arXiv 1612.00796",
        keeps="the summed Fisher information of the parameters",
        grid={"scale": (1.0, 3.0, 6.0), "penalty": (0.003, 0.01, 0.03, 0.1)},
        grows={"penalty": 2},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty < math.inf:
            raise UserError(f"ewc: expected a finite penalty of at least 0, got {self.penalty}")
        self.rule: Pema = Pema(c=math.inf)
        self.regularizer = FisherPenalty(self.rule, self.penalty)
