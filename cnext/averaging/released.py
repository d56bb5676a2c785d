"""Baselines: DEMA and PEMA as their authors released them, and no average."""

from __future__ import annotations

import torch
from torch import Tensor

from cnext import ops
from cnext.averaging.base import MovingAverage, Statistics, match_strides
from cnext.averaging.hyperparameters import LEAST, MOST, number
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
        after_optimizer: as released, `update` is called after the optimizer's step, while ``.grad`` is there. A
            gradient then meets the parameters that it led to, ``ema`` begins with the first step's result in place of
            the task's start, and `end_task` adds no last step.

    Raises:
        UserError: ``factor`` is not positive and finite, or ``fallback`` not in [0, 1].

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

    def __init__(
        self,
        factor: float = 2.0,
        fallback: float = 0.01,
        dtype: torch.dtype = torch.float32,
        after_optimizer: bool = False,
    ) -> None:
        super().__init__(dtype)
        self.factor = number("Dema: factor", factor, LEAST, MOST)
        self.fallback = number("Dema: fallback", fallback, 0, 1)
        self.place = "after optimizer" if after_optimizer else "before optimizer"
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
        if self.step == 0 and self.place == "after optimizer":
            self.begin_with_parameters()
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
        for names in self.groups if self.place == "before optimizer" else ():
            ops.ema_step_(self.listed(self.parameters, names), self.listed(self.ema, names), beta=WITHOUT_GRADIENT)
        return super().finish()


class PemaReleased(PerStepAverage):
    """ema <- alpha o ema + (1 - alpha) o theta after every micro-batch, as the released loop: its two paths.

    In float32 the loop's matrix product raises, and its handler takes a constant alpha of 0.99: an average of the last
    steps. In bfloat16 and float16 alpha is that of `cnext.ops.pema_released_`, in the parameters' own dtype, for
    matrices; other tensors take the constant. That diverges, and serves for comparison.

    `update` is called after every micro-batch's backward pass, and for the last one of a step after the optimizer's,
    with the gradients still there; the steps of `begin_task` are micro-batches. The first call only copies the
    parameters.

    Parameters: float32, bfloat16 or float16. Memory within a task: ``ema``, in the parameters' dtype; in 16 bits within
    a call also the inverse of a matrix as wide as the widest parameter, in float32.

    Args:
        damping: lambda of Eq. 3, positive, added to the matrix as released.

    Raises:
        UserError: ``damping`` is out of range.

    Example:
        >>> import torch
        >>> from cnext.averaging import PemaReleased
        >>> weight, average = torch.nn.Parameter(torch.zeros(1, 1)), PemaReleased()
        >>> with average.task({"weight": weight}, steps=2):
        ...     for value in (0.0, 1.0):  # the second of two micro-batches takes the optimizer's step
        ...         weight.grad = torch.ones(1, 1)
        ...         weight.data[:] = value
        ...         average.update()
        >>> round(weight.item(), 4)
        0.01

    Reference: the code released with Continual-NExT, arXiv 2602.18055.
    """

    name = "pema-released"
    place = "micro-batch"

    def __init__(self, damping: float = 1e-5) -> None:
        super().__init__(dtype=None)
        self.damping = number("PemaReleased: damping", damping, LEAST, MOST)

    def read_gradients(self, losses: Tensor | None) -> None:
        if self.step == 0:
            self.begin_with_parameters()
            return
        for group in self.groups:
            by_formula = [name for name in group if self._has_formula(name)]
            theta, ema = self.listed(self.parameters, by_formula), self.listed(self.ema, by_formula)
            gradients = [match_strides(self.parameters[name].grad, self.parameters[name]) for name in by_formula]
            ops.pema_released_(theta, gradients, ema, damping=self.damping, fallback=WITHOUT_GRADIENT)
            others = [name for name in group if name not in by_formula]
            ops.ema_step_(self.listed(self.parameters, others), self.listed(self.ema, others), beta=WITHOUT_GRADIENT)

    def _has_formula(self, name: str) -> bool:
        parameter = self.parameters[name]
        return parameter.ndim == 2 and parameter.dtype != torch.float32 and parameter.grad is not None

    def finish(self) -> Statistics:
        """As released, a tensor whose average is not a number keeps what training left."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if not self.ema[name].isnan().any():
                    parameter.copy_(self.ema[name])
        return {}


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
    writes = False
    reads_gradients = False

    def check_parameters(self) -> None:
        return

    def start(self) -> None:
        return

    def finish(self) -> Statistics:
        return {}
