"""The rules of released code, to be compared with: CIA's DEMA, the loop released with Continual-NExT, and none."""

from __future__ import annotations

import torch
from torch import Tensor

from cnext import ops
from cnext.averaging.base import MovingAverage, laid_out
from cnext.averaging.per_step import PerStepAverage

MISSING = 0.99
"""Both released loops' weight of the old where a gradient is missing, as it is for the last step's result."""


class Dema(PerStepAverage):
    """ema <- (1 - alpha) ema + alpha theta with one alpha per tensor and step, from norms; see `cnext.ops.dema_step_`.

    The first step has no earlier gradient, and only remembers its own. State: ema and the last gradient.

    Args:
        factor, fallback: as released; a later variant has 0.01 and 0.001.

    Reference: Qiao et al., CIA, ICML 2025.
    """

    name = "dema"

    def __init__(self, factor: float = 2.0, fallback: float = 0.01, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.factor, self.fallback = factor, fallback
        self.grad_prev: dict[str, Tensor] = {}

    def slots(self) -> dict[str, dict[str, Tensor]]:
        return {"ema": self.ema, "grad_prev": self.grad_prev}

    def start(self) -> None:
        super().start()
        self.grad_prev |= self.like()

    def read_gradients(self, losses: Tensor | None) -> None:
        for k, names in enumerate(self.groups):
            if self.step == 0:
                found = [laid_out(self.parameters[name].grad, self.parameters[name]) for name in names]
                torch._foreach_copy_(self.listed(self.grad_prev, names), found)
                continue
            step = self.prepared(k, "dema_step_", None, None, self.ema, self.grad_prev)
            theta = self.listed(self.parameters, names)
            step(theta=theta, grad=self.gradients(names), factor=self.factor, fallback=self.fallback)

    def finish(self) -> dict[str, tuple[float, float]]:
        for names in self.groups:
            ops.ema_step_(self.listed(self.parameters, names), self.listed(self.ema, names), beta=MISSING)
        return super().finish()


class PemaReleased(PerStepAverage):
    """The released loop's matrix formula, through its exact low-rank identity; see `cnext.ops.pema_released_`.

    Tensors that are no matrices take the loop's fallback. It diverges.

    Args:
        damping: lambda of Eq. 3, added to the matrix as released.
    """

    name = "pema-released"

    def __init__(self, damping: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.damping = damping

    def _fallback(self, names: list[str]) -> None:
        ops.ema_step_(self.listed(self.parameters, names), self.listed(self.ema, names), beta=MISSING)

    def read_gradients(self, losses: Tensor | None) -> None:
        for group in self.groups:
            names = [name for name in group if self.parameters[name].ndim == 2]
            theta, ema = self.listed(self.parameters, names), self.listed(self.ema, names)
            gradients = [laid_out(self.parameters[name].grad, self.parameters[name]) for name in names]
            ops.pema_released_(theta, gradients, ema, damping=self.damping, fallback=MISSING)
            self._fallback([name for name in group if self.parameters[name].ndim != 2])

    def finish(self) -> dict[str, tuple[float, float]]:
        for names in self.groups:
            self._fallback(names)
        return super().finish()


class NoAverage(MovingAverage):
    """The parameters as the optimizer leaves them."""

    name = "none"

    def start(self) -> None:
        return

    def finish(self) -> dict[str, tuple[float, float]]:
        return {}
