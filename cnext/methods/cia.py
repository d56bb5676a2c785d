"""CIA: LoRA under the released DEMA rule, a moving average whose weight follows the gradients of every step.

    theta* <- (1 - alpha) theta* + alpha theta,    alpha = 2 (1 + |g|) / (|theta - theta*| |g - g_before|)

|.| sums absolute values over a tensor; alpha is 0.01 where it would not be in (0, 1). A task starts with theta* = theta
and ends with theta = theta*, see `cnext.averaging.Dema`. theta is where g was taken; the release reads it one step
later, after the optimizer, and starts theta* after the first step. CIA also chooses between old and new adapters by how
similar instructions are; that is left out, as in Continual-NExT.

Reference: Qiao et al., Large Continual Instruction Assistant, arXiv 2410.10868.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnext.averaging import Dema
from cnext.errors import UserError
from cnext.methods.base import Averaged, Card
from cnext.methods.lora import Lora


@dataclass
class Cia(Averaged, Lora):
    """y = W x + scale B A x."""

    factor: float = 2.0
    """Factor of alpha; a later variant of its authors has 0.01."""
    fallback: float = 0.01
    """alpha where the formula gives none in (0, 1); a later variant has 0.001."""

    card = Card("arXiv 2410.10868")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < math.inf or not 0 <= self.fallback <= 1:
            raise UserError(
                f"cia: expected a positive factor and fallback in [0, 1], got {self.factor} and {self.fallback}"
            )
        self.rule = Dema(self.factor, self.fallback)
