"""Hyperparameters and gradients out of range, and states that do not fit: refused, and nothing is changed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from cnext.averaging import RULES, Constant, Dema, MovingAverage, Pema, PemaKron, PemaLiteral, PemaReleased, PemaStep
from cnext.errors import UserError

STEPS = 4
COMPUTING = {name: rule for name, rule in RULES.items() if name != "none"}
pytestmark = pytest.mark.filterwarnings("ignore:.*every gradient that was read:RuntimeWarning", "ignore:pema-literal")
every = pytest.mark.parametrize("rule", COMPUTING.values(), ids=COMPUTING)

RANGES: dict[tuple[Callable[..., Any], str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    (Pema, "c"): ((1e-12, 5, math.inf), (0, -1, 1e-320)),
    (Pema, "damping"): ((0, 1e12), (-1e-9, math.inf, 1e300)),
    (PemaKron, "pull"): ((0, 1), (-1, math.inf, 1e300)),
    (PemaKron, "c"): ((1, math.inf), (0, 1e-320)),
    (PemaKron, "damping"): ((1e-12,), (0, math.inf, 1e-320)),
    (PemaKron, "shrinkage"): ((0, 1), (-0.1, 1.1)),
    (PemaStep, "retention"): ((1e-9, 0.999), (0, 1, -1)),
    (PemaStep, "kappa"): ((1e-12, 1), (0, -1, math.inf, 1e308, 1e-320)),
    (Constant, "retention"): ((0.5,), (0, 1, math.inf)),
    (Constant, "beta"): ((0, 1), (-1, 1.5)),
    (PemaLiteral, "fallback"): ((0, 1), (-1, 1.5, math.inf)),
    (PemaLiteral, "damping"): ((1e-5,), (0, -1, math.inf)),
    (PemaReleased, "damping"): ((1e-5,), (0, -1, math.inf)),
    (Dema, "factor"): ((0.01, 2), (0, -1, math.inf)),
    (Dema, "fallback"): ((0, 1), (-1, 1.5)),
}


def gradients(step: int) -> torch.Tensor:
    return torch.tensor([[1.0, 0.5], [0.0, 0.1], [2.0, 3.0]]) * (step + 1)


def trained(average: MovingAverage, given: Callable[[int], torch.Tensor], tasks: int = 2) -> nn.Parameter:
    weight = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    for _ in range(tasks):
        with average.task({"w": weight}, steps=STEPS):
            for step in range(STEPS):
                weight.grad = given(step)
                average.update()
                weight.data.sub_(0.1)
    return weight


DEFAULTS: dict[Callable[..., Any], dict[str, object]] = {
    Pema: {"c": 5, "damping": 1e-5, "unit": "step"},
    PemaKron: {"pull": 0.01, "c": 5, "damping": 0.01, "shrinkage": 0.1},
    PemaStep: {"retention": 0.05, "kappa": None},
    Constant: {"retention": 0.13, "beta": None},
    Dema: {"factor": 2, "fallback": 0.01, "after_optimizer": False},
    PemaReleased: {"damping": 1e-5},
}


@pytest.mark.parametrize("rule", DEFAULTS)
def test_defaults_are_those_that_the_reference_results_have(rule: Callable[..., Any]) -> None:
    taken = {name: parameter.default for name, parameter in inspect.signature(rule).parameters.items()}
    assert DEFAULTS[rule].items() <= taken.items()


@pytest.mark.parametrize(("made", "name"), RANGES, ids=lambda value: getattr(value, "__name__", value))
def test_hyperparameters_have_ranges(made: Callable[..., Any], name: str) -> None:
    valid, invalid = RANGES[made, name]
    for value in (
        *invalid,
        math.nan,
        "1",
        True,
        10**400,
        torch.ones(2),
        *([None] if name not in ("beta", "kappa") else []),
    ):
        with pytest.raises(UserError, match=f"{made.__name__}: {name} is .*; expected a number (from|between)"):
            made(**{name: value})
    for value in valid:
        assert bool(trained(made(**{name: value}), gradients).isfinite().all())


@pytest.mark.parametrize("retention", [1 - 1e-16, 1 - 2e-16, 5e-324])
def test_a_retention_that_no_kappa_can_keep_is_refused(retention: float) -> None:
    average = PemaStep(retention)
    with pytest.raises(UserError, match=r"retention of .* over 4 steps is kappa = .*; expected one from 1e-12"):
        average.begin_task(nn.Linear(2, 2), STEPS)
    assert not average.steps


AVERAGED = {(Pema, 1.2e19), (PemaKron, 1.5e19), (PemaStep, 1e-22)}
"""What is in range, or skipped with a warning, as rows of `PemaKron` whose squares overflow."""


@pytest.mark.parametrize("size", [1e-22, 1.2e19, 1.5e19])
@pytest.mark.parametrize("rule", [Pema, PemaKron, PemaStep], ids=lambda rule: rule.name)
def test_squared_gradients_out_of_range_are_refused_or_averaged(rule: Any, size: float) -> None:
    """Their sum, or its reciprocal, overflows: the task is not averaged, and what is known of earlier ones stays."""
    average = rule()
    weight = trained(average, gradients, tasks=1)
    kept = {key: tensor.clone() for key, tensor in average.state_dict().items()}
    average.begin_task({"w": weight}, STEPS)
    for _ in range(STEPS):
        weight.grad = torch.full((3, 2), size)
        average.update()
        weight.data.sub_(0.1)
    before = weight.detach().clone()
    if (rule, size) in AVERAGED:
        average.end_task()
    else:
        with pytest.raises(UserError, match=r"float32's range.*call abort_task"):
            average.end_task()
        assert torch.equal(weight, before)
        assert average.steps == STEPS
        average.abort_task()
        after = average.state_dict()
        assert after.keys() == kept.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in kept.items())
    assert bool(weight.isfinite().all())
    assert all(bool(past.isfinite().all()) for past in average.past().values())


@every
@pytest.mark.parametrize("seed", range(4))
def test_no_finite_gradient_makes_a_parameter_not_finite(rule: Any, seed: int) -> None:
    """Of any size that a float32 has: the average is finite, or refused and the parameters stay."""
    source = torch.Generator().manual_seed(seed)
    average, weight = rule(), nn.Parameter(torch.arange(6.0).reshape(3, 2))
    for _ in range(3):
        size = 10.0 ** torch.randint(-44, 39, (1,), generator=source).item()
        with suppress(UserError), average.task({"w": weight}, steps=STEPS):  # refused: out of float32's range
            for _ in range(STEPS):
                weight.grad = torch.randn(3, 2, generator=source) * size
                average.update()
                weight.data.sub_(0.1)
        assert bool(weight.isfinite().all())
        assert all(bool(past.isfinite().all()) for past in average.past().values())


def damaged(state: dict[str, torch.Tensor], how: str) -> dict[str, Any]:
    """A state of which one thing is wrong."""
    key = next(key for key in state if key.endswith(".w"))
    tensor = state[key]
    return {
        "shape": lambda: {**state, key: tensor.reshape(-1)[:1]},
        "dtype": lambda: {**state, key: tensor.to(torch.int64)},
        "name": lambda: {(name if name != key else f"{key}2"): t for name, t in state.items()},
        "rule": lambda: {**state, "other.w": tensor},
        "list": lambda: {**state, key: tensor.tolist()},
        "no step": lambda: {name: t for name, t in state.items() if name != "step"},
        "steps of several": lambda: {**state, "steps": torch.ones(2, dtype=torch.int64)},
        "step of a fraction": lambda: {**state, "step": torch.tensor(1.5)},
        "negative step": lambda: {**state, "step": torch.tensor(-1)},
        "step after the last": lambda: {**state, "step": torch.tensor(STEPS + 1)},
    }[how]()


HOW = ("shape", "dtype", "name", "rule", "list", "no step", "steps of several", "step of a fraction")


@every
def test_the_bytes_that_it_keeps_are_known_beforehand(rule: Any) -> None:
    average = rule()
    weight = trained(average, gradients)
    found = sum(tensor.nbytes for kind in average.kept for tensor in average.slots()[kind].values())
    assert found == average.kept_bytes({"w": weight})


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (3, 1), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("rule", [Pema, PemaKron], ids=lambda rule: rule.__name__)
def test_a_parameter_of_another_shape_than_before_is_refused(rule: Any, shape: tuple[int, ...]) -> None:
    average = rule()
    trained(average, gradients)
    with pytest.raises(
        UserError, match=r"'w' has shape .*; it was \(3, 2\) before|the group 'w' has .* before; a group"
    ):
        average.begin_task({"w": nn.Parameter(torch.ones(shape))}, STEPS)


@every
@pytest.mark.parametrize("how", [*HOW, "negative step", "step after the last"])
def test_a_state_that_does_not_fit_is_refused_whole(rule: Any, how: str) -> None:
    average, other = rule(), rule()
    weight = trained(average, gradients, tasks=1)
    trained(other, lambda step: 3 * gradients(step), tasks=1)
    for each, size in ((average, 2.0), (other, 5.0)):
        each.begin_task({"w": weight}, STEPS)
        weight.grad = gradients(0) * size
        each.update()
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match="load_state_dict"):
        other.load_state_dict(damaged(average.state_dict(), how))
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("rule", [Pema, PemaKron], ids=lambda rule: rule.name)
@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t * math.nan, lambda t: t.long()])
def test_a_past_that_is_no_sum_of_squares_is_refused(rule: Any, change: Callable[..., torch.Tensor]) -> None:
    average = rule()
    trained(average, gradients, tasks=1)
    state = {key: change(tensor) if "." in key else tensor for key, tensor in average.state_dict().items()}
    with pytest.raises(UserError, match=r"expected torch.float32 and finite values"):
        rule().load_state_dict(state)


@pytest.mark.parametrize("rule", [Pema, PemaKron], ids=lambda rule: rule.name)
def test_a_loaded_state_takes_the_place_of_all_that_was_known(rule: Any) -> None:
    average, other = rule(), rule()
    trained(average, gradients, tasks=1)
    other.begin_task({"elsewhere": nn.Parameter(torch.ones(3, 2))}, 1)
    other.parameters["elsewhere"].grad = torch.ones(3, 2)
    other.update()
    other.end_task()
    other.load_state_dict(average.state_dict())
    assert other.state_dict().keys() == average.state_dict().keys()


def test_a_state_is_not_loaded_into_an_average_that_is_swapped_in() -> None:
    average = PemaStep()
    average.begin_task(nn.Linear(2, 2), STEPS)
    state = average.state_dict()
    with average.for_eval(), pytest.raises(UserError, match="load_state_dict: the average is swapped in"):
        average.load_state_dict(state)
