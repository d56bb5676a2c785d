"""Benchmarks of the averaging ops: ``pytest bench/ --benchmark-only -k averaging``; CNEXT_TEST_DEVICE=cuda: on a GPU.

The rank-8 branches that MAGE trains (three of four) on LLaMA2-13B's seven linear layers: 40 decoder layers on a GPU, 5
on a CPU. Every candidate is checked against plain torch first. A row's ``time_over_baseline`` is the median ratio of
its time to the baseline's, timed in pairs; the baseline is `pema_step_` unless the row's group says otherwise.

On a GPU calls are timed as CUDA graphs. Rows named "eager" include the host's time, as in a training loop; what
synchronizes with the host (DEMA as released, the dense inverse) has only these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timing
import torch
from timing import DEVICE, GPU, SMALL
from torch import Tensor, nn

from cnext import ops
from cnext.ops import dispatch
from cnext.ops.averaging_table import OPS

# torch 2.11 warns about its own code
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
LAYERS = 40 if GPU else 1 if SMALL else 5
WIDE, NARROW, RANK, LIVE = 13824, 5120, 8, 3
LINEARS = [(NARROW, NARROW)] * 4 + [(NARROW, WIDE)] * 2 + [(WIDE, NARROW)]
SHAPES = [shape for m, n in LINEARS for shape in ((RANK, m), (n, RANK))] * LIVE * LAYERS
PARAMETERS = sum(a * b for a, b in SHAPES)
MATRIX = (RANK, NARROW if GPU else 1024)
LEVEL = torch.full((len(SHAPES),), 1e-3, dtype=torch.float64, device=DEVICE)
ADAMW = {"step": 2, "lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}


def filled(*scales: float, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[list[Tensor]]:
    """One list of tensors per scale: normal values; squares of them for a negative scale."""
    torch.manual_seed(0)
    lists = [[torch.randn(shape, device=DEVICE) * abs(scale) for shape in shapes] for scale in scales]
    return [[(x.square() if s < 0 else x).to(dtype) for x in xs] for xs, s in zip(lists, scales, strict=True)]


def eager(theta: list[Tensor], grad: list[Tensor], fisher: list[Tensor], ema: list[Tensor], level: Tensor) -> None:
    for now, g, f, average in zip(theta, grad, fisher, ema, strict=True):
        _one(now, g, f, average, 1e-3)


def _one(theta: Tensor, grad: Tensor, fisher: Tensor, ema: Tensor, level: float) -> None:
    fisher.add_(grad * grad)
    beta = level / (fisher + level)
    ema.copy_(beta * ema + (1 - beta) * theta)


def foreach(theta: list[Tensor], grad: list[Tensor], fisher: list[Tensor], ema: list[Tensor], level: Tensor) -> None:
    torch._foreach_addcmul_(fisher, grad, grad)
    denominator = torch._foreach_add(fisher, 1e-3)
    torch._foreach_reciprocal_(denominator)
    torch._foreach_mul_(denominator, 1e-3)
    distance = torch._foreach_sub(ema, theta)
    torch._foreach_mul_(distance, denominator)
    torch._foreach_add_(distance, theta)
    torch._foreach_copy_(ema, distance)


def compiled() -> Callable[..., None]:
    function = torch.compile(_one, dynamic=True)

    def run(theta: list[Tensor], grad: list[Tensor], fisher: list[Tensor], ema: list[Tensor], level: Tensor) -> None:
        for now, g, f, average in zip(theta, grad, fisher, ema, strict=True):
            function(now, g, f, average, 1e-3)

    return run


PER_STEP = {
    "fused": lambda: ops.pema_step_,
    "triton": lambda: lambda *lists: ops.pema_step_(*lists, impl="triton"),
    "eager": lambda: eager,
    "foreach": lambda: foreach,
    "torch.compile": compiled,
}
if not GPU:
    del PER_STEP["triton"]
TIMED = ("graph", "eager") if GPU else ("eager",)
"""How calls are timed."""


def fused_step() -> tuple[Callable[[], object], list[list[Tensor]]]:
    """The baseline, on its own buffers."""
    lists = filled(1e-2, 1e-3, -1e-3, 1e-2)
    return lambda: ops.pema_step_(*lists, LEVEL), lists


@pytest.mark.parametrize("timed", TIMED)
@pytest.mark.parametrize("name", PER_STEP)
def test_pema_step(race, name, timed):
    function = PER_STEP[name]()
    baseline, lists = fused_step()
    plain = copy.deepcopy(lists)
    OPS["pema_step_"].reference(*plain, LEVEL)
    function(*lists, LEVEL)
    for k in (2, 3):
        torch.testing.assert_close(lists[k], plain[k], rtol=1e-5, atol=1e-7)
    path = ops.last_path("pema_step_") if name in ("fused", "triton") else name
    race.run(
        lambda: function(*lists, LEVEL),
        baseline,
        parameters=PARAMETERS,
        bytes_per_parameter=24,
        operations_per_parameter=12,
        state_bytes_per_parameter=8,
        path=path,
        graph=timed == "graph",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("rule", ["pema_literal", "ema_step", "fisher_accumulate", "pema_merge", "dema_step"])
def test_rule(race, rule, dtype):
    """Every other fused rule; parameters and gradients in float32 or bfloat16, float32 state."""
    op = OPS[f"{rule}_"]
    scales = {"theta": 1e-2, "theta_old": 1e-2, "grad": 1e-3, "grad_prev": 1e-3, "ema": 1e-2}
    lists = [
        filled(scales.get(name, -1e-3), dtype=dtype if role == "p" else torch.float32)[0]
        for name, role in op.roles.items()
    ]
    numbers = {"ema_step": {"beta": 0.99}, "pema_merge": {"new_scale": 1.0}}.get(rule, {})
    function = getattr(ops, op.name)
    plain, result = copy.deepcopy(lists), copy.deepcopy(lists)
    op.reference(*plain, **numbers)
    function(*result, **numbers)
    for a, b in zip(plain, result, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    width = {name: lists[i][0].element_size() for i, name in enumerate(op.roles)}
    passes = sum(width.values()) + sum(width[name] for name in op.written)
    twice = sum(width.values()) if len(op.rules) > 1 else 0
    baseline, _ = fused_step()
    race.run(
        lambda: function(*lists, **numbers),
        baseline,
        parameters=PARAMETERS,
        bytes_per_parameter=passes + twice,
        path=ops.last_path(op.name),
        graph=GPU,
    )


def dema_released(theta: list[Tensor], grad: list[Tensor], ema: list[Tensor], held: dict[int, Tensor]) -> None:
    """CIA's loop as released: norms and a host synchronization per tensor, and a copy of every gradient."""
    for i, (now, g, average) in enumerate(zip(theta, grad, ema, strict=True)):
        a = torch.norm(now - average, p=1)
        b = torch.norm(g, p=1)
        c = torch.norm(g - held[i], p=1)
        alpha = float(2 * (1 + b) / (a * c))
        if not 0 < alpha < 1:
            alpha = 0.01
        ema[i] = (1 - alpha) * average + alpha * now
        held[i] = copy.deepcopy(g)


def test_dema_as_released_eager(race):
    theta, grad, ema, previous = filled(1e-2, 1e-3, 1e-2, 1e-3)
    held = dict(enumerate(previous))
    other = copy.deepcopy([theta, grad, ema, previous])
    dema_released(theta, grad, ema, held)
    ops.dema_step_(*other)
    torch.testing.assert_close(ema, other[2], rtol=1e-4, atol=1e-6)
    baseline, _ = fused_step()
    race.run(
        lambda: dema_released(theta, grad, ema, held),
        baseline,
        parameters=PARAMETERS,
        bytes_per_parameter=72,
        state_bytes_per_parameter=8,
        path="torch",
    )


if not GPU:
    HOST = ("op", "prepared", "prepared, gradients per call", "gradients of parameters per call")

    @pytest.mark.parametrize("name", HOST)
    @pytest.mark.parametrize("rule", ["pema_step_", "dema_step_", "adamw_pema_step_"])
    def test_host_time(race, rule, name):
        """Host time of a call on 1,680 empty tensors, without work for kernels; the baseline is the unprepared op.

        Rounds start with cold caches; ``warm_seconds`` is the median of consecutive calls. On a GPU `gpu.py` has these
        rows, with the tensors of the other benchmarks.
        """
        tensors, op = 1680, OPS[rule]
        race.benchmark.group = f"averaging, host time of {rule} on {tensors} tensors"
        given = dict(zip(op.roles, filled(*[1.0] * len(op.roles), shapes=[(0, 2)] * tensors), strict=True))
        parameters = [nn.Parameter(g) for g in given["grad"]]
        for parameter, g in zip(parameters, given["grad"], strict=True):
            parameter.grad = g
        rows = [torch.full((tensors,), 1e-3, dtype=torch.float64)] if op.rows[0] else []
        numbers = ADAMW if rule.startswith("adamw") else {}
        whole = ops.prepare(rule, *given.values())
        per_call = ops.prepare(rule, *(None if one == "grad" else x for one, x in given.items()))
        calls: dict[str, Callable[[], object]] = {
            "op": lambda: getattr(ops, rule)(*given.values(), *rows, **numbers),
            "prepared": lambda: whole(*rows, **numbers),
            "prepared, gradients per call": lambda: per_call(*rows, grad=given["grad"], **numbers),
            "gradients of parameters per call": lambda: per_call(*rows, grad=[p.grad for p in parameters], **numbers),
        }
        warm = timing.call_ms(calls[name], 50)["host_ms"] / 1e3
        race.run(calls[name], calls["op"], rounds=40, path=ops.last_path(rule), tensors=tensors, warm_seconds=warm)


@pytest.mark.parametrize("name", ["dense inverse", "low rank"])
def test_released_formula(race, name):
    """The released loop's matrix formula on one A tensor; the baseline is its low-rank form."""
    theta, grad, ema = filled(1e-3, 1e-3, 1e-3, shapes=[MATRIX])

    def dense(theta: list[Tensor], grad: list[Tensor], ema: list[Tensor]) -> None:
        distance, fisher = theta[0] - ema[0], grad[0].square()
        matrix = distance.T @ fisher + 1e-5 * torch.eye(MATRIX[1], device=DEVICE, dtype=distance.dtype)
        alpha = (grad[0] + 1) @ torch.linalg.inv(matrix)
        ema[0].copy_(ema[0] * alpha + theta[0] * (1 - alpha))

    wide = [[x.double() for x in xs] for xs in (theta, grad, ema)]
    exact, exact_low = copy.deepcopy(wide), copy.deepcopy(wide)
    dense(*exact)
    OPS["pema_released_"].reference(*exact_low)
    torch.testing.assert_close(exact_low[2], exact[2], rtol=1e-8, atol=1e-8)
    start = ema[0].clone()

    def low(*lists: list[Tensor]) -> None:
        lists[2][0].copy_(start)  # the rule diverges, so every call starts from the same values
        ops.pema_released_(*lists)

    def inverse() -> None:
        ema[0].copy_(start)
        dense(theta, grad, ema)

    other = copy.deepcopy([theta, grad, ema])
    race.run(
        inverse if name == "dense inverse" else lambda: low(theta, grad, ema),
        lambda: low(*other),
        parameters=theta[0].numel(),
        bytes_per_parameter=16,
        rounds=5,
        path="torch",
        shape=MATRIX,
    )


ADAMW_TRAFFIC = {"torch fused": 28, "torch fused, then pema_step": 52, "one pass": 44, "one pass, v as fisher": 36}
"""Bytes moved per parameter."""


def adamw(name: str) -> Callable[[], object]:
    """A step of AdamW, with the average where the name says so, on its own buffers."""
    theta, grad, m, v, fisher, ema = filled(1e-2, 1e-3, 1e-4, -1e-3, -1e-3, 1e-2)
    if name.startswith("one pass"):
        own = None if "v as" in name else fisher
        return lambda: ops.adamw_pema_step_(theta, grad, m, v, own, ema, LEVEL, **ADAMW)
    parameters = [torch.nn.Parameter(x) for x in theta]
    for parameter, g in zip(parameters, grad, strict=True):
        parameter.grad = g
    numbers = {key: value for key, value in ADAMW.items() if key != "step"}
    optimizer = torch.optim.AdamW(parameters, **numbers, fused=True, capturable=GPU)
    if name == "torch fused":
        return optimizer.step
    return lambda: (optimizer.step(), ops.pema_step_(theta, grad, fisher, ema, LEVEL))


def check_adamw(impl: str | None = None) -> None:
    """Checks `adamw_pema_step_` against plain torch, with its own Fisher diagonal and with v in its place."""
    for shared in (False, True):
        lists = filled(1e-2, 1e-3, 1e-4, -1e-3, -1e-3, 1e-2, shapes=SHAPES[:14])
        plain = copy.deepcopy(lists)
        for made, by in ((lists, impl), (plain, "reference")):
            theta, grad, m, v, fisher, ema = made
            ops.adamw_pema_step_(theta, grad, m, v, None if shared else fisher, ema, LEVEL[:14], **ADAMW, impl=by)
        for a, b in zip(lists, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ADAMW_TRAFFIC)
def test_adamw(race, name):
    """AdamW with the average; the baseline is torch's fused AdamW followed by the fused `pema_step_`."""
    check_adamw()
    race.run(
        adamw(name),
        adamw("torch fused, then pema_step"),
        parameters=PARAMETERS,
        bytes_per_parameter=ADAMW_TRAFFIC[name],
        path=dispatch.choose("pema_step_", DEVICE, None),
        graph=GPU,
    )
