"""Baselines: DEMA and PEMA as their authors released them, and no average."""

from __future__ import annotations

import torch
from torch import Tensor

from cnext import ops
from cnext.averaging.base import MovingAverage, Statistics, match_strides
from cnext.averaging.per_step import PerStepAverage

WITHOUT_GRADIENT = 0.99
"""The weight of the old average in both released loops where there is no gradient, as for the last step's result."""


class Dema(PerStepAverage):
    """ema <- (1 - alpha) ema + alpha theta at every step, with one alpha per tensor from norms: CIA's dynamic EMA.

    alpha is that of `cnext.ops.dema_step_`. The first step has no earlier gradient, and only remembers its own.

    Parameters: float32, bfloat16 or float16, of any shape. Memory within a task: ``ema``, and the last gradient in the
    parameters' dtype.

    Args:
        factor: of alpha; 2.0 as released, 0.01 in a later variant.
        fallback: alpha where the formula leaves (0, 1); 0.01 as released, 0.001 in a later variant.
        dtype: of ``ema``, see `PerStepAverage`.

    Example:
        >>> import torch
        >>> from cnext.averaging import Dema
        >>> weight, average = torch.nn.Parameter(torch.zeros(1)), Dema()
        >>> with average.task({"weight": weight}, steps=1):
        ...     weight.grad = torch.ones(1)
        ...     average.update()
        ...     weight.data[:] = 1.0  # in place of an optimizer's step
        >>> round(weight.item(), 4)  # the last step has no gradient: 0.99 of the average
        0.01

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
        self._read = [self._norms(names) for names in self.groups]

    def _norms(self, names: list[str]) -> Tensor:
        """The sizes of the gradients in ``grad_prev``, without elements that are not finite."""
        gradients = self.listed(self.grad_prev, names)
        return torch.stack([g.nan_to_num(0, 0, 0).abs().sum(dtype=torch.float64) for g in gradients])

    def read_gradients(self, losses: Tensor | None) -> None:
        for k, names in enumerate(self.groups):
            if self.step == 0:
                found = [match_strides(self.parameters[name].grad, self.parameters[name]) for name in names]
                torch._foreach_copy_(self.listed(self.grad_prev, names), found)
                self._read[k] += self._norms(names)
                continue
            step = self.prepared(k, "dema_step_", None, None, self.ema, self.grad_prev)
            theta = self.listed(self.parameters, names)
            norms = step(theta=theta, grad=self.gradients(names), factor=self.factor, fallback=self.fallback)
            assert norms is not None, "dema_step_ returns norms"
            self._read[k] += norms[:, 1].nan_to_num(0, 0, 0)

    def finish(self) -> Statistics:
        # A state that was loaded has the last gradients alone.
        both = zip(self._read, map(self._norms, self.groups), strict=True)
        self.warn_of_zeros(sum(float((read + last).sum()) for read, last in both))
        for names in self.groups:
            ops.ema_step_(self.listed(self.parameters, names), self.listed(self.ema, names), beta=WITHOUT_GRADIENT)
        return super().finish()


class PemaReleased(PerStepAverage):
    """ema <- alpha o ema + (1 - alpha) o theta at every step, alpha by the matrix formula of the released loop.

    alpha is that of `cnext.ops.pema_released_`, for matrices; other tensors take the loop's constant 0.99. It diverges,
    as the released code does, and serves for comparison.

    Parameters: float32, bfloat16 or float16. Memory within a task: ``ema``; at a step, three copies of a matrix.

    Args:
        damping: lambda of Eq. 3, added to the matrix as released.
        dtype: of ``ema``, see `PerStepAverage`.

    Example:
        >>> import torch
        >>> from cnext.averaging import PemaReleased
        >>> bias, average = torch.nn.Parameter(torch.zeros(1)), PemaReleased()
        >>> with average.task({"bias": bias}, steps=1):
        ...     bias.grad = torch.ones(1)
        ...     average.update()
        ...     bias.data[:] = 1.0  # in place of an optimizer's step
        >>> round(bias.item(), 4)
        0.01

    Reference: the code released with Continual-NExT, arXiv 2602.18055.
    """

    name = "pema-released"

    def __init__(self, damping: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.damping = damping

    def _fallback(self, names: list[str]) -> None:
        ops.ema_step_(self.listed(self.parameters, names), self.listed(self.ema, names), beta=WITHOUT_GRADIENT)

    def read_gradients(self, losses: Tensor | None) -> None:
        for group in self.groups:
            names = [name for name in group if self.parameters[name].ndim == 2]
            theta, ema = self.listed(self.parameters, names), self.listed(self.ema, names)
            gradients = [match_strides(self.parameters[name].grad, self.parameters[name]) for name in names]
            ops.pema_released_(theta, gradients, ema, damping=self.damping, fallback=WITHOUT_GRADIENT)
            self._fallback([name for name in group if self.parameters[name].ndim != 2])

    def finish(self) -> Statistics:
        for names in self.groups:
            self._fallback(names)
        return super().finish()


class NoAverage(MovingAverage):
    """No average: the parameters stay as the optimizer leaves them. No memory.

    Example:
        >>> import torch
        >>> from cnext.averaging import NoAverage
        >>> average = NoAverage()
        >>> with average.task(torch.nn.Linear(2, 1), steps=1):
        ...     average.update()
        >>> average.statistics
        {}
    """

    name = "none"
    reads_gradients = False

    def check_parameters(self) -> None:
        return

    def start(self) -> None:
        return

    def finish(self) -> Statistics:
        return {}
