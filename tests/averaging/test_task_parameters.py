"""What an average is given: names under wrappers, parameters that it cannot average, a past, and gradients at all."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from cnext.averaging import RULES, UNITS, Constant, Dema, MovingAverage, Pema, PemaKron, PemaStep
from cnext.distributed.wrapped_names import unwrapped
from cnext.errors import UserError

STEPS = 4
READING = {name: rule for name, rule in RULES.items() if rule.reads_gradients}
COMPUTING = {name: rule for name, rule in RULES.items() if name != "none"}
WATCHING = {name: rule for name, rule in READING.items() if name != "pema-released"}
"""Without the one that does not look at the gradients of float32 parameters."""
WITH_PAST = {"pema": Pema, "pema-kron": PemaKron}
pytestmark = pytest.mark.filterwarnings("ignore:pema-literal")


def every(rules: dict[str, type[MovingAverage]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", rules.values(), ids=rules)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def train(net: nn.Module, average: MovingAverage, given: dict[str, Any], task: int, *, late: bool = False) -> None:
    """A task of plain descent. late: `update` comes after the gradients were dropped."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average.begin_task(given, STEPS)
    for step in range(STEPS):
        seen = torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * task + step))
        (net(seen) - task).square().mean().backward()
        if not late:
            average.update()
        optimizer.step()
        optimizer.zero_grad()
        if late:
            average.update()
    average.end_task()


@every(READING)
def test_an_update_without_any_gradient_is_refused(rule: type[MovingAverage]) -> None:
    net, average = network(), rule()
    with pytest.raises(UserError, match=r"every \.grad is None; call update after the backward pass .* on_step_end"):
        train(net, average, dict(net.named_parameters()), 0, late=True)
    assert average.step == 0
    average.abort_task()
    other = copy.deepcopy(net)
    with pytest.raises(UserError, match="with the parameters of the model that is trained"):
        train(net, average, dict(other.named_parameters()), 0)


@every({name: rule for name, rule in RULES.items() if name not in READING})
def test_rules_that_read_no_gradient_need_none(rule: type[MovingAverage]) -> None:
    net = network()
    train(net, rule(), dict(net.named_parameters()), 0, late=True)


@every(READING)
def test_sparse_gradients_are_refused_at_the_first_step(rule: type[MovingAverage]) -> None:
    words, average = nn.Embedding(5, 3, sparse=True), rule()
    average.begin_task(words, STEPS)
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UserError, match=r"gradient of 'weight' is torch\.sparse_coo; expected a dense one"):
        average.update()


@every(READING)
def test_branches_that_a_step_leaves_out_need_no_gradient(rule: type[MovingAverage]) -> None:
    weights = {name: nn.Parameter(torch.ones(3, 2)) for name in ("one", "two", "never")}
    average = rule()
    average.begin_task(weights, 2)
    for used in ("one", "two"):
        for parameter in weights.values():
            parameter.grad = None
        weights[used].grad = torch.ones(3, 2)
        average.update()
    average.end_task()


@every(READING)
def test_a_later_step_without_any_gradient_is_told(rule: type[MovingAverage]) -> None:
    weight, average = nn.Parameter(torch.ones(3, 2)), rule()
    average.begin_task({"weight": weight}, 4)
    for step in range(4):
        weight.grad = None if step == 1 else torch.ones(3, 2)
        if step == 1:
            with pytest.warns(RuntimeWarning, match=r"every \.grad is None; .* It counts as zero") as warned:
                average.update()
            assert warned[0].filename == __file__, "the line that called it is shown"
        else:
            average.update()
    average.end_task()


@every(WATCHING)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_gradients_that_are_all_zero_are_told_at_the_end(value: float, rule: type[MovingAverage]) -> None:
    """As after ``zero_grad(set_to_none=False)``."""
    weight, average = nn.Parameter(torch.ones(3, 2)), rule()
    average.begin_task({"weight": weight}, 2)
    for _ in range(2):
        weight.grad = torch.full((3, 2), value)
        average.update()
    with pytest.warns(
        RuntimeWarning, match=f"{rule.name}: every gradient that was read was zero or not finite"
    ) as warned:
        average.end_task()
    assert {one.filename for one in warned} == {__file__}


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_is_satisfied_by_its_own_gradients(unit: Any) -> None:
    """Of micro-batches they were read by hooks; a frozen parameter beside the trained ones has none."""
    net, average = network(), Pema(unit=unit)
    net[0].weight.requires_grad_(False)
    average.begin_task(dict(net.named_parameters()), 2)
    for step in range(2):
        losses = net(torch.randn(8, 5, generator=torch.Generator().manual_seed(step))).square().sum(1)
        if unit == "sample":
            average.update(losses)
        losses.mean().backward()
        if unit == "step":
            average.update()
        net.zero_grad()
        if unit == "micro-batch":
            average.update()
    assert average.fisher_new["0.bias"].any()
    average.end_task()


def test_losses_that_tell_nothing_are_refused() -> None:
    net, average = network(), Pema(unit="sample")
    average.begin_task(net, 1)
    losses = net(torch.ones(2, 5)).sum(1)
    with pytest.raises(UserError, match="losses have no graph"):
        average.update(losses.detach())
    with pytest.raises(UserError, match="depends on no parameter of the task"):
        average.update(network()(torch.ones(2, 5)).sum(1))


WRAPPED = {
    "torch.compile": lambda net: torch.compile(net, backend="eager").named_parameters(),
    "DataParallel": lambda net: nn.DataParallel(net).named_parameters(),
    "compiled and parallel": lambda net: nn.DataParallel(torch.compile(net, backend="eager")).named_parameters(),
    "parallel and compiled": lambda net: torch.compile(nn.DataParallel(net), backend="eager").named_parameters(),
    "two times": lambda net: nn.DataParallel(nn.DataParallel(net)).named_parameters(),
    "a compiled layer": lambda net: [(n.replace("0.", "0._orig_mod."), p) for n, p in net.named_parameters()],
    "FSDP": lambda net: [(f"_fsdp_wrapped_module.{n}", p) for n, p in net.named_parameters()],
    "checkpointing": lambda net: [
        (n.replace("2.", "2._checkpoint_wrapped_module."), p) for n, p in net.named_parameters()
    ],
}


@every(WITH_PAST)
@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_wrapping_a_model_between_tasks_changes_nothing(rule: type[MovingAverage], wrapped: Callable[..., Any]) -> None:
    plain, other = network(), network()
    one, two = rule(), rule()
    for task in range(3):
        train(plain, one, dict(plain.named_parameters()), task)
        train(other, two, dict(wrapped(other) if task == 1 else other.named_parameters()), task)
    assert one.statistics == two.statistics
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert one.state_dict().keys() == two.state_dict().keys()


@every(WITH_PAST)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_state_file_of_a_wrapped_model_is_taken(rule: type[MovingAverage], prefix: str) -> None:
    """As earlier versions wrote it, in a task and between tasks."""
    net, average = network(), rule()
    given = dict(net.named_parameters())
    train(net, average, given, 0)
    for inside in (False, True):
        if inside:
            average.begin_task(given, STEPS)
        state = average.state_dict()
        renamed = {".".join((kind, prefix + name)) if name else kind: t for key, t in state.items()
                   for kind, _, name in [key.partition(".")]}  # fmt: skip
        again = rule()
        if inside:
            again.begin_task({prefix + name: p for name, p in given.items()}, STEPS)
        again.load_state_dict(load(save(renamed)))
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_a_state_file_with_a_parameter_under_two_names_is_refused() -> None:
    net, average = network(), Pema()
    train(net, average, dict(net.named_parameters()), 0)
    state = average.state_dict()
    state["fisher_old._orig_mod.0.bias"] = state["fisher_old.0.bias"].clone()
    with pytest.raises(UserError, match=r"'0.bias' and '_orig_mod.0.bias' are one name, '0.bias'"):
        Pema().load_state_dict(state)
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"begin_task: 'w' and '_orig_mod.w' are one name"):
        Pema().begin_task({"w": weight, "_orig_mod.w": nn.Parameter(torch.ones(2))}, 1)


def test_only_whole_parts_of_a_name_are_prefixes() -> None:
    for name in ("module", "modules.0.w", "block.module.w", "my_orig_mod.w", "submodule.w"):
        assert unwrapped(name) == name


@every(WITH_PAST)
@pytest.mark.parametrize("prefix", ["base_model.model.", "student.", "model.language_model."])
def test_names_with_a_prefix_that_is_not_known_are_refused(rule: type[MovingAverage], prefix: str) -> None:
    net, average = network(), rule()
    given = dict(net.named_parameters())
    longer = {prefix + name: parameter for name, parameter in given.items()}
    for first, second in ((given, longer), (longer, given)):
        average = rule()
        train(net, average, first, 0)
        with pytest.raises(UserError, match=r"differ from earlier ones by a prefix.*pass untrained=True"):
            average.begin_task(second, STEPS)
        assert not average.parameters
        average.begin_task(second, STEPS, untrained=True)


@every(WITH_PAST)
def test_a_task_that_nothing_is_known_of_is_told(rule: type[MovingAverage]) -> None:
    net, average = network(), rule()
    train(net, average, dict(net.named_parameters()), 0)
    numbered = {f"p{index}": parameter for index, parameter in enumerate(net.parameters())}
    with pytest.warns(RuntimeWarning, match=r"no past is known of 'p0', 'p1', 'p2' and 1 more, only of"):
        average.begin_task(numbered, STEPS)
    average.abort_task()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with average.task(numbered, steps=1, untrained=True):
            net(torch.ones(2, 5)).sum().backward()
            average.update()


def test_a_part_that_has_another_prefix_is_told() -> None:
    net, average = network(), Pema()
    train(net, average, dict(net.named_parameters()), 0)
    mixed = {name if name.startswith("0") else f"head.{name}": p for name, p in net.named_parameters()}
    with pytest.warns(
        RuntimeWarning, match=r"differ from earlier ones by a prefix.*'head.2.weight', earlier '2.weight'"
    ):
        average.begin_task(mixed, STEPS)


def test_a_cancelled_first_task_is_no_past() -> None:
    net, average = network(), Pema()
    average.begin_task(net, STEPS)
    average.abort_task()
    average.begin_task({f"p{index}": parameter for index, parameter in enumerate(net.parameters())}, STEPS)


def frozen(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 1, dtype=dtype), requires_grad=False)


class Wrapper(torch.Tensor):
    """A tensor subclass whose values are elsewhere, as quantized weights are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


TIED = nn.Parameter(torch.ones(4, 2))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "codes of a quantized weight": ({"w": frozen(torch.uint8)}, r"'w' has dtype torch.uint8; .*; pass the module"),
    "int64": ({"w": frozen(torch.int64)}, "'w' has dtype torch.int64"),
    "bool": ({"w": frozen(torch.bool)}, "'w' has dtype torch.bool"),
    "float64": ({"w": nn.Parameter(torch.ones(2).double())}, "'w' has dtype torch.float64; expected torch.float32, "),
    "complex": ({"w": nn.Parameter(torch.ones(2) + 0j)}, "'w' has dtype torch.complex64"),
    "float8": ({"w": frozen(torch.float8_e4m3fn)}, "'w' has dtype torch.float8_e4m3fn"),
    "sparse": ({"w": nn.Parameter(torch.eye(3).to_sparse())}, "'w' has layout torch.sparse_coo or gaps"),
    "gaps": ({"w": nn.Parameter(torch.ones(4, 6)[:, :3])}, "'w' has layout torch.strided or gaps"),
    "meta": ({"w": nn.Parameter(torch.ones(2, device="meta"))}, "'w' is on the meta device, without values"),
    "no shape yet": (dict(nn.LazyLinear(3).named_parameters()), "'weight' has no shape yet; run the model once"),
    "wrapper": ({"w": torch.ones(2).as_subclass(Wrapper)}, "'w' cannot be averaged: a Wrapper has no storage"),
    "number": ({"w": 1.0}, "'w' is a float; expected a parameter"),
    "tied": ({"a": TIED, "b": TIED}, "'a' and 'b' share memory, as tied weights do"),
    "overlap": ({"a": TIED, "b": nn.Parameter(TIED.detach()[1:])}, "'a' and 'b' share memory"),
    "nothing": ({}, "the mapping of parameters is empty"),
}


@every(COMPUTING)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_averaged_is_refused_when_the_task_begins(rule: type[MovingAverage], case: str) -> None:
    given, message = REFUSED[case]
    average = rule()
    with pytest.raises(UserError, match=message):
        average.begin_task(given, 1)
    assert not average.steps
    if case != "nothing":
        average.begin_task({"fine": nn.Parameter(torch.ones(2, 2))}, 1)


def test_views_of_one_matrix_side_by_side_are_no_overlap() -> None:
    whole = torch.ones(6, 3)
    Constant().begin_task({str(i): nn.Parameter(part) for i, part in enumerate(whole.split(2))}, 1)


GROUPED: dict[str, tuple[dict[str, nn.Parameter], str]] = {
    "dtypes": (
        {"q.a.A": nn.Parameter(torch.ones(2, 8)), "q.b.A": nn.Parameter(torch.ones(2, 8).bfloat16())},
        "'q.b.A' is torch.bfloat16 on cpu; expected torch.float32 on cpu",
    ),
    "transposed": ({"q.a.A": nn.Parameter(torch.ones(8, 2).T)}, r"'q.a.A' has strides \(1, 2\)"),
    "empty": ({"q.a.A": nn.Parameter(torch.ones(0, 8))}, "'q.a.A' has no elements"),
    "frozen": (
        {"q.a.A": nn.Parameter(torch.ones(2, 8)), "codes": frozen(torch.uint8)},
        "'codes' has dtype torch.uint8",
    ),
}


@pytest.mark.parametrize("case", GROUPED)
def test_kron_refuses_groups_that_it_could_not_read(case: str) -> None:
    given, message = GROUPED[case]
    average = PemaKron()
    average.frozen = {name: given[name] for name in given if name == "codes"}
    with pytest.raises(UserError, match=message):
        average.begin_task({name: given[name] for name in given if name != "codes"}, 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64], ids=str)
def test_a_dtype_that_an_average_cannot_have_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=f"got {dtype}"):
        PemaStep(dtype=dtype)


PER_STEP = {name: rule for name, rule in COMPUTING.items() if name not in WITH_PAST}


@every(PER_STEP)
@pytest.mark.parametrize("context", [False, True])
def test_a_task_without_any_update_is_not_discarded(rule: type[MovingAverage], context: bool) -> None:
    weight, average = nn.Parameter(torch.zeros(2, 2)), rule()
    task = average.task({"weight": weight}, steps=3)
    task.__enter__()
    weight.data.fill_(1.0)
    with pytest.raises(UserError, match=r"update was not called in this task of 3 steps.*abort_task to keep"):
        task.__exit__(None, None, None) if context else average.end_task()
    average.abort_task()
    assert bool((weight == 1).all()), "what was trained stays"


@every(PER_STEP)
@pytest.mark.parametrize("seen", [1, 3])
def test_a_task_with_fewer_updates_than_its_steps_is_told(rule: type[MovingAverage], seen: int) -> None:
    weight, average = nn.Parameter(torch.eye(2)), rule()
    average.begin_task({"weight": weight}, 10)
    for _ in range(seen):
        weight.grad = torch.eye(2)
        average.update()
    with pytest.warns(RuntimeWarning, match=f"end_task after {seen} of 10 steps: {rule.name} keeps more of the old"):
        average.end_task()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_average_of_a_copy_that_is_not_trained_is_told(dtype: torch.dtype) -> None:
    net = network().to(dtype)
    copied, average = copy.deepcopy(net), Constant(dtype=dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average.begin_task(copied, 3)
    for _ in range(3):
        net(torch.ones(2, 5, dtype=dtype)).square().sum().backward()
        average.update()
        optimizer.step()
    with pytest.warns(RuntimeWarning, match="the model that is trained, not of a copy"):
        average.end_task()


@pytest.mark.parametrize("steps", [np.int64(2), np.uint8(2)])
def test_steps_may_be_any_whole_number(steps: Any) -> None:
    average = Constant()
    average.begin_task(network(), steps)
    assert average.state_dict()["steps"].dtype == torch.int64
    assert type(average.steps) is int


@pytest.mark.parametrize("steps", [True, np.bool_(True), 2.0, np.float64(2), "2", None, np.int64(0)])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(UserError, match="expected a whole number of at least 1"):
        Constant().begin_task(network(), steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every(WATCHING)
def test_gradients_that_are_never_finite_are_told_at_the_end(rule: type[MovingAverage], value: float) -> None:
    weight, average = nn.Parameter(torch.ones(3, 2)), rule()
    average.begin_task({"weight": weight}, 2)
    for _ in range(2):
        weight.grad = torch.full((3, 2), value)
        average.update()
    with pytest.warns(RuntimeWarning, match=f"{rule.name}: every gradient that was read was zero or not finite"):
        average.end_task()


@pytest.mark.parametrize("last", [0.0, float("nan")])
@pytest.mark.parametrize("finite", [0, 1])
def test_dema_tells_of_no_zeros_where_one_step_had_a_gradient(finite: int, last: float) -> None:
    weight, average = nn.Parameter(torch.ones(3, 2)), Dema()
    average.begin_task({"weight": weight}, 3)
    for step in range(3):
        weight.grad = torch.full((3, 2), 1.0 if step == finite else last)
        average.update()
    average.end_task()
    assert bool(weight.isfinite().all())


class Inner(nn.Module):
    """A model with a child that has the name of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.module = nn.Linear(5, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x @ self.weight)


@every(WITH_PAST)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_child_named_module_is_no_wrapper(rule: type[MovingAverage], wrapped: bool) -> None:
    plain, other = Inner(), Inner()
    average, expected = rule(), rule()
    for task in range(2):
        train(plain, expected, dict(plain.named_parameters()), task)
        prefix = "module." if wrapped and task else ""
        train(other, average, {prefix + name: p for name, p in other.named_parameters()}, task)
    assert average.statistics.keys() == {"weight", "module.weight"}
    assert average.statistics == expected.statistics
    fresh = rule()
    fresh.load_state_dict(load(save(average.state_dict())))
    assert fresh.past().keys() == average.past().keys()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_child_named_module_that_is_trained_alone_keeps_its_past(frozen: bool) -> None:
    net, average = Inner(), Pema()
    train(net, average, dict(net.named_parameters()), 0)
    net.weight.requires_grad_(not frozen)
    given = net if frozen else {"module.weight": net.module.weight}
    average.begin_task(given, STEPS)
    assert average.parameters == {"module.weight": net.module.weight}


@pytest.mark.parametrize("untrained", [False, True])
def test_a_part_that_has_other_names_is_told(untrained: bool) -> None:
    net, average = network(), Pema()
    train(net, average, dict(net.named_parameters()), 0)
    mixed = {name if name.startswith("0") else f"p{name[-4:]}": p for name, p in net.named_parameters()}
    if untrained:
        average.begin_task(mixed, STEPS, untrained=True)
        return
    with pytest.warns(RuntimeWarning, match=r"no past is known of 'pight', 'pbias'; .* not in the task: '2.weight'"):
        average.begin_task(mixed, STEPS)
