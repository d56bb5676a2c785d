"""The table of the averaging ops: their arguments, their order in the kernels, their numbers and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops.foreach import Op

GUARDS = ("fallback", "clamp")
_STEP = {"theta": "p", "grad": "p", "fisher": "s", "ema": "e"}
_ADAMW = {"theta": "p", "grad": "p", "exp_avg": "s", "exp_avg_sq": "s", "fisher": "s", "ema": "e"}
_SHARED = {name: role for name, role in _ADAMW.items() if name != "fisher"}
_ADAMW_SCALARS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_UNIT = {"decay": 1.0, "scale": 1.0}


def literal_numbers(*, guard: str = "fallback", **numbers: float) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """The guard as a number."""
    if guard not in GUARDS:
        raise UserError(f"pema_literal_: guard is {guard!r}; expected one of {', '.join(GUARDS)}")
    return (), {**numbers, "clamp": float(guard == "clamp")}


def adamw_numbers(
    level: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **numbers: float,
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """Everything that changes from step to step as rows on the device, the rest as numbers."""
    rows = torch.empty((len(level), 4), dtype=torch.float64, device=level.device)
    rows[:, 0] = level
    changing = (1 - lr * weight_decay, lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** 0.5)
    for k, number in enumerate(changing, 1):
        rows[:, k] = number
    return (rows,), {"beta1": betas[0], "beta2": betas[1], "eps": eps, **numbers}


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
        Op("sums", ("sums",), {"tensors": "s"}, ("tensors",), 0, columns=1),
        Op(
            "pema_merge_",
            ("pema_merge",),
            {"theta": "p", "theta_old": "p", "fisher_new": "s", "fisher_old": "s"},
            ("theta", "fisher_old", "theta_old", "fisher_new"),
            2,
            {"new_scale": None, "c": 5.0, "damping": 1e-5},
            columns=5,
        ),
        Op("ema_step_", ("ema_step",), {"theta": "p", "ema": "e"}, ("ema", "theta"), 1, {"beta": None}),
        Op(
            "pema_step_",
            ("pema_step",),
            _STEP,
            ("ema", "fisher", "theta", "grad"),
            2,
            _UNIT,
            columns=4,
            rows=("level", 1),
        ),
        Op(
            "pema_literal_",
            ("pema_literal",),
            _STEP,
            ("ema", "fisher", "theta", "grad"),
            2,
            {"decay": 0.0, "scale": 1.0, "damping": 1e-5, "fallback": 0.99, "clamp": 0.0},
            columns=4,
            public=literal_numbers,
        ),
        Op(
            "dema_step_",
            ("dema_norms", "dema_step"),
            {"theta": "p", "grad": "p", "ema": "e", "grad_prev": "p"},
            ("ema", "grad_prev", "theta", "grad"),
            2,
            {"factor": 2.0, "fallback": 0.01},
            columns=3,
        ),
        Op(
            "adamw_pema_step_",
            ("adamw_pema_step",),
            _ADAMW,
            ("theta", "exp_avg", "exp_avg_sq", "ema", "fisher", "grad"),
            5,
            _ADAMW_SCALARS | _UNIT,
            columns=4,
            rows=("rows", 4),
            public=adamw_numbers,
        ),
        Op(
            "adamw_pema_step_shared_",
            ("adamw_pema_step_shared",),
            _SHARED,
            ("theta", "exp_avg", "exp_avg_sq", "ema", "grad"),
            4,
            _ADAMW_SCALARS,
            columns=4,
            rows=("rows", 4),
            public=adamw_numbers,
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
