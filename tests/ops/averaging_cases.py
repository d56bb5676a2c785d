"""Every averaging op with inputs that take both sides of its guards, as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cnext import ops
from cnext.ops import dispatch
from cnext.ops.averaging_table import OPS

DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
IMPLS = [i for i in ("cpp", "cuda", "triton") if not dispatch.missing(i, DEVICE)]
if only := os.environ.get("CNEXT_TEST_IMPL"):
    IMPLS = [only]
LAYERS = [i for i in ("cpp", "cuda", "triton") if i in IMPLS] or ["cpp"]
"""What `test_averaging_layers` compares with the C++ layer."""
INTERPRETED = IMPLS == ["triton"] and DEVICE == "cpu"
SIZES = [(1,), (63,), (1000,), (0,), (8, 129)] if INTERPRETED else [(1,), (63,), (1000,), (0,), (8, 513), (3, 13001)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def every_instruction_set(impl: str) -> Iterator[str]:
    """The names of the C++ core's instruction sets, each in use for its turn; one turn for other implementations."""
    if impl != "cpp":
        yield impl
        return
    core = dispatch.core("cpp")
    before = core.instruction_set()
    try:
        for name in core.instruction_sets():
            core.use_instruction_set(name)
            yield name
    finally:
        core.use_instruction_set(before)


@dataclass
class Case:
    """call(*lists, impl=...) is the public op; roles: what each list holds, in order; numbers: for the reference."""

    call: Callable[..., Tensor | None]
    op: str
    roles: tuple[str, ...]
    numbers: dict[str, float]


def _adamw(*lists: list[Tensor], fisher: bool, impl: str | None = None) -> Tensor:
    if not fisher:
        lists = (*lists[:4], None, *lists[4:])
    return ops.adamw_pema_step_(*lists, LEVEL[: len(lists[0])].to(DEVICE), **ADAMW, impl=impl)


ADAMW = {"step": 3, "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}
LEVEL = torch.linspace(0.0, 1e-2, len(SIZES), dtype=torch.float64)
_NUMBERS = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}


def _step(*lists: list[Tensor], impl: str | None = None) -> Tensor:
    return ops.pema_step_(*lists, LEVEL[: len(lists[0])].to(DEVICE), decay=0.9, scale=0.5, impl=impl)


def _literal(*lists: list[Tensor], impl: str | None = None, **numbers: object) -> Tensor:
    return ops.pema_literal_(*lists, damping=0.7, impl=impl, **numbers)


def _with(function: Callable[..., Tensor | None], **numbers: float) -> Callable[..., Tensor | None]:
    return lambda *lists, impl=None: function(*lists, **numbers, impl=impl)


def rows() -> Tensor:
    """The rows that `adamw_pema_step_` makes of its arguments."""
    table = torch.empty(len(SIZES), 4, dtype=torch.float64)
    table[:, 0] = LEVEL
    for k, value in enumerate((1 - 0.1 * 0.1, 0.1 / (1 - 0.9**3), (1 - 0.98**3) ** 0.5), 1):
        table[:, k] = value
    return table


CASES = {
    "fisher_accumulate": Case(
        _with(ops.fisher_accumulate_, scale=0.3), "fisher_accumulate_", ("f", "g"), {"scale": 0.3}
    ),
    "sums": Case(ops.sums, "sums", ("f",), {}),
    "pema_merge": Case(_with(ops.pema_merge_, new_scale=0.7), "pema_merge_", ("t", "t", "f", "f"), {"new_scale": 0.7}),
    "ema_step": Case(_with(ops.ema_step_, beta=0.9), "ema_step_", ("t", "e"), {"beta": 0.9}),
    "pema_step": Case(_step, "pema_step_", ("t", "g", "f", "e"), {"decay": 0.9, "scale": 0.5}),
    "pema_literal": Case(_literal, "pema_literal_", ("t", "g", "f", "e"), {"damping": 0.7}),
    "pema_literal_clamp": Case(
        _with(_literal, guard="clamp"), "pema_literal_", ("t", "g", "f", "e"), {"damping": 0.7, "clamp": 1.0}
    ),
    "dema_step": Case(ops.dema_step_, "dema_step_", ("t", "g", "e", "g"), {}),
    "adamw_pema_step": Case(_with(_adamw, fisher=True), "adamw_pema_step_", ("t", "g", "m", "f", "f", "e"), _NUMBERS),
    "adamw_pema_step_shared": Case(
        _with(_adamw, fisher=False), "adamw_pema_step_shared_", ("t", "g", "m", "f", "e"), _NUMBERS
    ),
}


def inputs(case: Case, param: torch.dtype = F32, ema: torch.dtype = F32, seed: int = 0) -> list[list[Tensor]]:
    """Lists of random tensors: parameters and gradients of unit size, small Fisher values with zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def one(role: str, size: tuple[int, ...]) -> Tensor:
        x = torch.randn(size, generator=generator)
        if role == "f":
            x = x.square() * 1e-2 * (torch.rand(size, generator=generator) > 0.2)
        return x.to({"t": param, "g": param, "e": ema}.get(role, F32)).to(DEVICE)

    return [[one(role, size) for size in SIZES] for role in case.roles]


def written(case: Case) -> list[int]:
    """Which of the case's lists the op writes."""
    op = OPS[case.op]
    return [i for i, name in enumerate(op.roles) if name in op.written]


def oracle(case: Case, lists: list[list[Tensor]]) -> tuple[list[list[Tensor]], Tensor | None]:
    """The reference in float64 on copies: the lists afterwards, and what it returned."""
    copies = [[tensor.double().cpu() for tensor in tensors] for tensors in lists]
    arguments = [*copies]
    if OPS[case.op].rows[0]:
        arguments.append(LEVEL if OPS[case.op].rows[1] == 1 else rows())
    return copies, OPS[case.op].reference(*arguments, **case.numbers)


def clone(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in tensors] for tensors in lists]
