"""CIA: LoRA with the released DEMA rule, a moving average whose weight follows the gradients of every step.

    theta* <- (1 - alpha) theta* + alpha theta,    alpha = 2 (1 + |g|) / (|theta - theta*| |g - g_before|)

|.| is the sum of absolute values over a tensor; alpha is 0.01 where the formula is not in (0, 1). A task starts with
theta* = theta and ends with theta = theta*, see `cnext.averaging.Dema`. theta is where g was computed; the released
code reads it one step later, after the optimizer, and starts theta* after the first step. CIA also chooses between old
and new adapters by the similarity of instructions; as in Continual-NExT, this part is left out.

Reference: Qiao et al., Large Continual Instruction Assistant, arXiv 2410.10868.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from cnext.averaging import Dema
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank


@dataclass
class Cia(LowRank):
    """y = W x + scale B A x."""

    factor: Annotated[float, "Factor of alpha; a later variant by its authors uses 0.01."] = 2.0
    fallback: Annotated[float, "alpha where the formula is not in (0, 1); a later variant uses 0.001."] = 0.01
    after_optimizer: Annotated[bool, "Update the average after the optimizer's step, as released, not before."] = False

    card = Card("arXiv 2410.10868", grid={"scale": (1.0, 3.0, 6.0), "factor": (0.01, 0.1, 0.5, 2.0)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < math.inf or not 0 <= self.fallback <= 1:
            raise UserError(
                f"cia: expected a positive factor and fallback in [0, 1], got {self.factor} and {self.fallback}"
            )
        self.rule = Dema(self.factor, self.fallback, after_optimizer=self.after_optimizer)
