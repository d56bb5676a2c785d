"""Rules that average at every step: constant EMA, PEMA per step, and the paper's equation as printed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from cnext import ops
from cnext.averaging.base import MovingAverage, Statistics, by_kind, mean_and_std
from cnext.averaging.hyperparameters import LEAST, MOST, number
from cnext.errors import UserError, unknown
from cnext.ops import checks


class PerStepAverage(MovingAverage):
    """Keeps ``ema``, a copy of the parameters at the task's start that every step moves; `end_task` writes it back.

    Memory within a task: ``ema`` in its dtype, and what the subclass adds; nothing between tasks.

    Args:
        dtype: of ``ema``: float32, or a 16-bit dtype, which must be the parameters' own where theirs is 16-bit too. In
            bfloat16 a change of less than 1/256 of a value is lost, in float16 of less than 1/2048. None: the
            parameters' own.
    """

    def __init__(self, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__()
        if dtype is not None and dtype not in checks.PARAM:
            raise UserError(f"expected the dtype of an average, {', '.join(map(str, checks.PARAM))}, got {dtype}")
        self.dtype = dtype
        self.ema: dict[str, Tensor] = {}
        self._prepared: dict[int, ops.Prepared] = {}

    def __getstate__(self) -> dict[str, object]:
        # A copy has other tensors and prepares its own calls.
        return {**self.__dict__, "_prepared": {}}

    def slots(self) -> dict[str, dict[str, Tensor]]:
        return {"ema": self.ema}

    def evaluated(self) -> Mapping[str, Tensor]:
        return self.ema

    def check_parameters(self) -> None:
        super().check_parameters()
        for parameter in self.parameters.values():
            ema = self.dtype or parameter.dtype
            checks.require_one_16_bit_dtype("begin_task", {"ema": ema, "theta": parameter.dtype})

    def start(self) -> None:
        for name, parameter in self.parameters.items():
            self.ema[name] = parameter.detach().to(self.dtype or parameter.dtype, copy=True)
        self.groups = list(by_kind(self.parameters))
        self._prepared = {}

    def begin_with_parameters(self) -> None:
        """Sets the average to the parameters as they are now."""
        with torch.no_grad():
            for name, average in self.ema.items():
                average.copy_(self.parameters[name])

    def prepared(self, group: int, op: str, *slots: Mapping[str, Tensor] | None) -> ops.Prepared:
        """An op on the state of a group, prepared at its first call. A slot of None is given per call.

        The parameters are given per call too: others may replace their storage within a task.
        """
        if group not in self._prepared:
            lists = [None if slot is None else self.listed(slot, self.groups[group]) for slot in slots]
            self._prepared[group] = ops.prepare(op, *lists)
        return self._prepared[group]

    def require_steps(self) -> None:
        if not self.step:
            raise UserError(
                f"end_task: update was not called in this task of {self.steps} steps, so the average holds the values "
                "from before it; call update at every step, or abort_task to keep what was trained"
            )
        if self.step < self.steps:
            warnings.warn(
                f"end_task after {self.step} of {self.steps} steps: {self.name} keeps more of the old than it would "
                "after all of them; begin the task with the number of its steps, and call update at each",
                RuntimeWarning,
                stacklevel=3,
            )

    def finish(self) -> Statistics:
        self.require_finite()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.ema[name])
        return {}

    def require_finite(self) -> None:
        """Raises UserError where the average of finite parameters is not finite."""
        for name, parameter in self.parameters.items():
            if not bool(self.ema[name].isfinite().all()) and bool(parameter.isfinite().all()):
                raise UserError(
                    f"end_task: the average of {name!r} is not finite, and the parameter is: squared gradients, or "
                    "parameters of an earlier step, were out of float32's range; call abort_task, which keeps what was "
                    "trained, check the loss and its scale, and train the task again"
                )

    def reset(self) -> None:
        for slot in self.slots().values():
            slot.clear()
        self._prepared = {}

    def like(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Zeros of the parameters' shapes and strides, in their own dtype or another."""
        return {n: torch.zeros_like(p, dtype=dtype, requires_grad=False) for n, p in self.parameters.items()}

    def listed(self, slot: Mapping[str, Tensor], names: list[str]) -> list[Tensor]:
        return [slot[name] for name in names]

    def gradients(self, names: list[str]) -> list[Tensor | None]:
        return [self.parameters[name].grad for name in names]


class Constant(PerStepAverage):
    """ema <- beta ema + (1 - beta) theta at every step, with beta = retention^(1 / steps).

    Parameters: float32, bfloat16 or float16, of any shape. Memory within a task: ``ema``.

    Args:
        retention: weight, in (0, 1), that the task's starting values keep at its end, whatever the number of steps.
        beta: in [0, 1]; used as it is in place of ``retention``.
        dtype: of ``ema``, see `PerStepAverage`.

    Raises:
        UserError: ``retention`` or ``beta`` is out of range.

    Example:
        >>> import torch
        >>> from cnext.averaging import Constant
        >>> weight, average = torch.nn.Parameter(torch.zeros(1)), Constant(beta=0.5)
        >>> with average.task({"weight": weight}, steps=1):
        ...     average.update()
        ...     weight.data[:] = 1.0  # in place of an optimizer's step
        >>> weight.item()
        0.5
    """

    name = "constant"
    reads_gradients = False

    def __init__(self, retention: float = 0.13, beta: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.retention = number("Constant: retention", retention, 0, 1, inside=True)
        self.beta = None if beta is None else number("Constant: beta", beta, 0, 1)

    def read_gradients(self, losses: Tensor | None) -> None:
        self._seen_gradient = self._seen_gradient or self.has_gradient()
        self._average()

    def _average(self) -> None:
        beta = self.retention ** (1 / self.steps) if self.beta is None else self.beta
        for k, names in enumerate(self.groups):
            self.prepared(k, "ema_step_", None, self.ema)(theta=self.listed(self.parameters, names), beta=beta)

    def finish(self) -> Statistics:
        seen = self._seen_gradient or self.has_gradient()
        if not seen and all(_close(self.ema[name], p) for name, p in self.parameters.items()):
            warnings.warn(
                "constant: no parameter of the task has had a gradient or another value since it began; begin the task "
                "with the parameters of the model that is trained, not of a copy",
                RuntimeWarning,
                stacklevel=3,
            )
        self._average()
        return super().finish()


def _close(average: Tensor, parameter: Tensor) -> bool:
    """Whether an average holds a parameter's values, but for rounding."""
    rounding = 2 * torch.finfo(average.dtype).eps
    return torch.allclose(average, parameter.detach().to(average.dtype), rtol=rounding, atol=0)


class PemaStep(PerStepAverage):
    """ema <- beta ema + (1 - beta) theta at every step, beta = level / (F + level) per parameter.

    F is the sum of the task's squared gradients and level = kappa mean(F), per tensor, over the steps before this one:
    only the shape of F within a tensor matters. kappa = b / (1 - b) with b = retention^(1 / steps), so an element with
    the mean F keeps ``retention`` of its starting value over the task, and one with a smaller F more.

    Parameters: float32, bfloat16 or float16, of any shape. Memory within a task: ``ema``, and 4 bytes a parameter (F).

    Args:
        retention: weight, in (0, 1), that the starting value keeps at the task's end where F is at its mean.
        kappa: positive; used as it is in place of ``retention``.
        dtype: of ``ema``, see `PerStepAverage`.

    Raises:
        UserError: ``retention`` or ``kappa`` is out of range. `begin_task`: so is the kappa of ``retention``.
            `end_task`: the sum of squared gradients overflowed float32.

    Example:
        >>> import torch
        >>> from cnext.averaging import PemaStep
        >>> weight, average = torch.nn.Parameter(torch.zeros(1)), PemaStep(kappa=1.0)
        >>> with average.task({"weight": weight}, steps=1):
        ...     weight.grad = torch.ones(1)
        ...     average.update()
        ...     weight.data[:] = 1.0  # in place of an optimizer's step
        >>> weight.item(), average.statistics["weight"]
        (0.5, (0.5, 0.0))
    """

    name = "pema-step"

    def __init__(self, retention: float = 0.05, kappa: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.retention = number("PemaStep: retention", retention, 0, 1, inside=True)
        self.kappa = None if kappa is None else number("PemaStep: kappa", kappa, LEAST, MOST)
        self.fisher: dict[str, Tensor] = {}
        self.level: dict[str, Tensor] = {}

    def slots(self) -> dict[str, dict[str, Tensor]]:
        return {"ema": self.ema, "fisher": self.fisher, "level": self.level}

    def start(self) -> None:
        super().start()
        beta = self.retention ** (1 / self.steps)
        kappa = self.kappa or (beta / (1 - beta) if beta < 1 else math.inf)
        if not LEAST <= kappa <= MOST:
            raise UserError(
                f"begin_task: PemaStep's retention of {self.retention:g} over {self.steps} steps is kappa = {kappa:g}; "
                f"expected one from {LEAST:g} to {MOST:g}: pass another retention, or kappa"
            )
        self.fisher |= self.like(torch.float32)
        self._levels, self._factors, self._rows = [], [], []
        for names in self.groups:
            sizes = [float(self.parameters[name].numel()) for name in names]
            device = self.parameters[names[0]].device
            self._factors.append(kappa / torch.tensor(sizes, dtype=torch.float64, device=device))
            self._levels.append(torch.zeros(len(names), dtype=torch.float64, device=device))
            self._rows.append(torch.zeros(len(names), 4, dtype=torch.float64, device=device))
        self.restore()

    def restore(self) -> None:
        for names, levels in zip(self.groups, self._levels, strict=True):
            self.level |= dict(zip(names, levels.unbind(), strict=True))  # views

    def read_gradients(self, losses: Tensor | None) -> None:
        self._average(1.0)

    def _average(self, scale: float) -> None:
        for k, names in enumerate(self.groups):
            theta = self.listed(self.parameters, names)
            gradients = self.gradients(names) if scale else theta
            step = self.prepared(k, "pema_step_", None, None, self.fisher, self.ema)
            rows = step(self._levels[k], theta=theta, grad=gradients, scale=scale)
            assert rows is not None, "pema_step_ returns statistics"
            self._levels[k].copy_(rows[:, 1] * self._factors[k])
            self._rows[k].copy_(rows)

    def finish(self) -> Statistics:
        self._average(0.0)
        self.warn_of_zeros(sum(float(level.sum()) for level in self._levels))
        rows = {
            n: row
            for names, rows in zip(self.groups, self._rows, strict=True)
            for n, row in zip(names, rows.tolist(), strict=True)
        }
        super().finish()
        return {name: mean_and_std([rows[name][0], *rows[name][2:]]) for name in self.parameters}


class PemaLiteral(PerStepAverage):
    """ema <- beta ema + (1 - beta) theta at every step, beta = (g + 1) / ((theta - ema) g^2 + damping), guarded.

    The paper's equation as printed. Where beta is not in (0, 1) the guard replaces it. At the magnitudes that occur
    beta is about 1 / damping nearly everywhere, so that the guard decides: "fallback" makes the rule a constant
    average, "clamp" keeps the average where it was. ``inside`` is the share of beta in (0, 1) over the last task; below
    1% `end_task` warns.

    Parameters: float32, bfloat16 or float16, of any shape. Memory within a task: ``ema``, and 4 bytes a parameter.

    Args:
        guard: "fallback" takes the constant ``fallback``, "clamp" the nearer of 0 and 1.
        fallback: beta of the guard "fallback", in [0, 1].
        damping: lambda of Eq. 3, positive.
        dtype: of ``ema``, see `PerStepAverage`.

    Raises:
        UserError: the guard is unknown, or ``fallback`` or ``damping`` is out of range.

    Example:
        >>> import torch
        >>> from cnext.averaging import PemaLiteral
        >>> weight, average = torch.nn.Parameter(torch.zeros(1)), PemaLiteral(damping=4.0)
        >>> with average.task({"weight": weight}, steps=1):
        ...     weight.grad = torch.ones(1)
        ...     average.update()  # beta = 2 / 4
        >>> average.inside
        1.0

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 4.
    """

    name = "pema-literal"

    def __init__(
        self,
        guard: ops.Guard = "fallback",
        fallback: float = 0.99,
        damping: float = 1e-5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dtype)
        if guard not in ops.GUARDS:
            raise unknown("guard", guard, ops.GUARDS)
        self.options = {
            "guard": guard,
            "fallback": number("PemaLiteral: fallback", fallback, 0, 1),
            "damping": number("PemaLiteral: damping", damping, LEAST, MOST),
        }
        self.fisher: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.inside = float("nan")

    def slots(self) -> dict[str, dict[str, Tensor]]:
        return {"ema": self.ema, "fisher": self.fisher, "counts": self.counts}

    def start(self) -> None:
        super().start()
        self.fisher |= self.like(torch.float32)
        self._counted = []
        for names in self.groups:
            device = self.parameters[names[0]].device
            self._counted.append(torch.zeros(len(names), 4, dtype=torch.float64, device=device))
        self.restore()

    def restore(self) -> None:
        for names, counted in zip(self.groups, self._counted, strict=True):
            self.counts |= dict(zip(names, counted.unbind(), strict=True))  # views

    def read_gradients(self, losses: Tensor | None) -> None:
        for k, names in enumerate(self.groups):
            step = self.prepared(k, "pema_literal_", None, None, self.fisher, self.ema)
            theta = self.listed(self.parameters, names)
            self._counted[k] += step(theta=theta, grad=self.gradients(names), **self.options)

    def finish(self) -> Statistics:
        number, inside = (sum(float(counted[:, k].sum()) for counted in self._counted) for k in (0, 1))
        self.inside = inside / number if number else float("nan")
        self.warn_of_zeros(sum(float(fisher.sum()) for fisher in self.fisher.values()))
        super().finish()
        if number and self.inside < 0.01:
            warnings.warn(
                f"pema-literal: {100 * (1 - self.inside):.2f}% of beta lay outside (0, 1) and were replaced by the "
                f"guard {self.options['guard']!r}: this is in effect a constant average",
                RuntimeWarning,
                stacklevel=3,
            )
        return {}
