"""Table of the averaging ops: operands, dtypes, scalars and reductions.

Schemas, checks and fake kernels are made from it. Tests compare it with the C++, CUDA and Triton kernels, the reference
and the public functions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cnext.errors import unknown
from cnext.ops.foreach import Op

Guard = Literal["fallback", "clamp"]
"""What `pema_literal_` does where beta is not inside (0, 1): take a constant, or the nearer of 0 and 1."""
GUARDS: tuple[Guard, ...] = get_args(Guard)
_STEP = {"theta": "p", "grad": "p", "fisher": "s", "ema": "e"}
_ADAMW = {"theta": "p", "grad": "p", "exp_avg": "s", "exp_avg_sq": "s", "fisher": "s", "ema": "e"}
_SHARED = {name: role for name, role in _ADAMW.items() if name != "fisher"}
_ADAMW_SCALARS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_FISHER_SCALARS = {"decay": 1.0, "scale": 1.0}


def literal_scalars(*, guard: str = "fallback", **scalars: float) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """The scalars of `pema_literal_`, of which the guard is one."""
    if guard not in GUARDS:
        raise unknown("guard", guard, GUARDS)
    return (), {**scalars, "clamp": float(guard == "clamp")}


def adamw_scalars(
    level: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **scalars: float,
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """What changes from step to step as rows on the device, (tensors, 4) float64, and the other numbers as scalars."""
    rows = torch.empty((len(level), 4), dtype=torch.float64, device=level.device)
    rows[:, 0] = level
    changing = (1 - lr * weight_decay, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5)
    for k, number in enumerate(changing, 1):
        rows[:, k] = number
    return (rows,), {"beta1": betas[0], "beta2": betas[1], "eps": eps, **scalars}


OPS = {
    op.name: op
    for op in (
        Op(
            "fisher_accumulate_",
            ("fisher_accumulate",),
            {"fisher": "s", "grad": "p"},
            ("fisher", "grad"),
            1,
            {"scale": 1.0},
        ),
        Op("sums", ("sums",), {"tensors": "s"}, ("tensors",), 0, reductions="+"),
        Op(
            "pema_merge_",
            ("pema_merge",),
            {"theta": "p", "theta_old": "p", "fisher_new": "s", "fisher_old": "s"},
            ("theta", "fisher_old", "theta_old", "fisher_new"),
            2,
            {"new_scale": None, "c": 5.0, "damping": 1e-5},
            reductions="+++<>",
        ),
        Op("ema_step_", ("ema_step",), {"theta": "p", "ema": "e"}, ("ema", "theta"), 1, {"beta": None}),
        Op(
            "pema_step_",
            ("pema_step",),
            _STEP,
            ("ema", "fisher", "theta", "grad"),
            2,
            _FISHER_SCALARS,
            reductions="++++",
            rows=("level", 1),
        ),
        Op(
            "pema_literal_",
            ("pema_literal",),
            _STEP,
            ("ema", "fisher", "theta", "grad"),
            2,
            {"decay": 0.0, "scale": 1.0, "damping": 1e-5, "fallback": 0.99, "clamp": 0.0},
            reductions="++++",
            convert=literal_scalars,
        ),
        Op(
            "dema_step_",
            ("dema_norms", "dema_step"),
            {"theta": "p", "grad": "p", "ema": "e", "grad_prev": "p"},
            ("ema", "grad_prev", "theta", "grad"),
            2,
            {"factor": 2.0, "fallback": 0.01},
            reductions="+++",
        ),
        Op(
            "adamw_pema_step_",
            ("adamw_pema_step",),
            _ADAMW,
            ("theta", "exp_avg", "exp_avg_sq", "ema", "fisher", "grad"),
            5,
            _ADAMW_SCALARS | _FISHER_SCALARS,
            reductions="++++",
            rows=("rows", 4),
            convert=adamw_scalars,
        ),
        Op(
            "adamw_pema_step_shared_",
            ("adamw_pema_step_shared",),
            _SHARED,
            ("theta", "exp_avg", "exp_avg_sq", "ema", "grad"),
            4,
            _ADAMW_SCALARS,
            reductions="++++",
            rows=("rows", 4),
            convert=adamw_scalars,
        ),
        Op(
            "pema_released_",
            (),
            {"theta": "p", "grad": "p", "ema": "e"},
            ("ema", "theta", "grad"),
            1,
            {"damping": 1e-5, "fallback": 0.99},
        ),
    )
}
