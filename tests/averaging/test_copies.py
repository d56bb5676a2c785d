"""Copies, abandoned tasks, and parameters that several averages have."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

from cnext.averaging import RULES, Constant, Dema, FisherAccumulator, MovingAverage, NoAverage, Pema, PemaStep
from cnext.errors import UserError

STEPS = 4
MADE: dict[str, Callable[[], MovingAverage]] = {
    **RULES,
    "pema of micro-batches": partial(Pema, unit="micro-batch"),
    "pema of samples": partial(Pema, unit="sample"),
    "dema after the optimizer": partial(Dema, after_optimizer=True),
}
COMPUTING = {name: rule for name, rule in MADE.items() if name != "none"}
WITH_PAST = {name: rule for name, rule in MADE.items() if name.startswith("pema") and rule().kept}
pytestmark = pytest.mark.filterwarnings("ignore:pema-literal", "ignore:end_task after")


def every(rules: dict[str, Callable[[], MovingAverage]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", rules.values(), ids=rules)


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_torch,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def graded() -> nn.Parameter:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    return weight


def step(net: nn.Module, average: MovingAverage, seed: int) -> None:
    seen = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    losses = (net(seen) - 1).square().sum(1)
    if by_sample := isinstance(average, Pema) and average.accumulator.unit == "sample":
        average.update(losses)
    losses.mean().backward()
    if not by_sample:
        average.update()
    with torch.no_grad():
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    net.zero_grad()


def inside(rule: Callable[[], MovingAverage], steps: int = 2) -> tuple[nn.Module, MovingAverage]:
    """A model and its average in the second task."""
    net, average = network(), rule()
    with average.task(net, steps=STEPS):
        for seed in range(STEPS):
            step(net, average, seed)
    average.begin_task(net, STEPS)
    for seed in range(steps):
        step(net, average, 10 + seed)
    return net, average


def same(one: MovingAverage, other: MovingAverage) -> bool:
    state, again = one.state_dict(), other.state_dict()
    return state.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in state.items())


@every_copy
@every(MADE)
@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_copy_with_its_model_goes_on_to_the_bit(rule: Any, copied: Callable[[Any], Any], at: int) -> None:
    net, average = inside(rule, at)
    before = average.state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    other, another = copied((net, average))
    for seed in range(at, STEPS):
        step(other, another, 10 + seed)
    assert all(torch.equal(tensor, average.state_dict()[key]) for key, tensor in before.items()), "the original's"
    for seed in range(at, STEPS):
        step(net, average, 10 + seed)
    assert same(average, another)
    assert average.end_task() == another.end_task()
    assert same(average, another)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@every_copy
def test_an_average_that_is_swapped_in_is_so_in_the_copy(copied: Callable[[Any], Any]) -> None:
    net, average = inside(PemaStep)
    average.swap_in()
    other, another = copied((net, average))
    another.swap_out()
    average.swap_out()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@every_copy
@every(COMPUTING)
def test_a_copy_without_its_model_is_refused(rule: Any, copied: Callable[[Any], Any]) -> None:
    net, average = inside(rule)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    other = copied(average)
    for call in (other.update, other.end_task, other.swap_in):
        with pytest.raises(UserError, match=r"copied within a task and without its model: nothing else has its '0"):
            call()
    other.abort_task()
    assert not other.steps
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    step(net, average, 12)
    average.end_task() if isinstance(average, Pema) else average.abort_task()


@every_copy
@every(WITH_PAST)
def test_a_copy_between_tasks_has_a_past_of_its_own(rule: Any, copied: Callable[[Any], Any]) -> None:
    net, average = inside(rule)
    average.abort_task()
    other = copied(average)
    assert same(average, other)
    kept = {name: tensor.clone() for name, tensor in average.past().items()}
    with other.task(net, steps=STEPS):
        for seed in range(STEPS):
            step(net, other, seed)
    assert all(torch.equal(tensor, average.past()[name]) for name, tensor in kept.items())
    assert not same(average, other)


@every(MADE)
def test_a_shallow_copy_is_refused(rule: Any) -> None:
    with pytest.raises(UserError, match="would share its state with it; use copy"):
        copy.copy(rule())


def test_an_accumulator_copied_with_its_parameters_reads_theirs() -> None:
    parameters, fisher = {"w": nn.Parameter(torch.ones(2))}, {"w": torch.zeros(2)}
    accumulator = FisherAccumulator("micro-batch")
    accumulator.open(parameters, fisher)
    with pytest.raises(UserError, match="would add to the same tensors"):
        copy.copy(accumulator)
    others, sums, other = pickle.loads(pickle.dumps((parameters, fisher, accumulator)))
    (3 * others["w"]).sum().backward()
    other.step()
    assert sums["w"].tolist() == [9.0, 9.0]
    assert not fisher["w"].any()


def sent(average: MovingAverage) -> MovingAverage:
    """As multiprocessing sends it to another process: its tensors are in memory that both processes share."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other one needs a process
    try:
        return pickle.loads(ForkingPickler.dumps(average))
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def test_an_average_sent_to_another_process_does_not_write_here() -> None:
    weight, average = graded(), Pema()
    with average.task({"w": weight}, steps=1):
        average.update()
    kept, other = average.fisher_old["w"].clone(), sent(average)
    with other.task({"w": graded()}, steps=1):
        other.update()
    assert not torch.equal(other.state_dict()["fisher_old.w"], kept)
    assert torch.equal(average.fisher_old["w"], kept)
    average.begin_task({"w": weight}, 1)
    other = sent(average)
    assert other.parameters["w"].is_shared()
    with pytest.raises(UserError, match=r"was sent here by another process.*begins the task itself and loads state_di"):
        other.update()


@every(MADE)
@pytest.mark.parametrize("steps", [0, 1, STEPS])
@pytest.mark.parametrize("first", [True, False])
def test_an_aborted_task_leaves_no_trace(rule: Any, steps: int, first: bool) -> None:
    net, average = (network(), rule()) if first else inside(rule)
    average.abort_task()
    before = {key: tensor.clone() for key, tensor in average.state_dict().items()}
    extra = {**dict(net.named_parameters()), "new": nn.Parameter(torch.ones(2, 2))}
    average.begin_task(extra, STEPS)
    for seed in range(steps):
        step(net, average, seed)
    trained = [parameter.detach().clone() for parameter in net.parameters()]
    average.abort_task()
    after = average.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert all(torch.equal(a, b) for a, b in zip(trained, net.parameters(), strict=True))
    average.abort_task()


def test_an_abort_after_resuming_keeps_the_past() -> None:
    net, average = inside(Pema)
    state, other = average.state_dict(), Pema()
    other.begin_task(net, STEPS)
    other.load_state_dict(state)
    other.abort_task()
    assert {key for key in other.state_dict() if "." in key} == {key for key in state if key.startswith("fisher_old")}


def test_a_context_takes_note_of_its_own_task_alone() -> None:
    net, average = network(), Constant()
    with average.task(net, steps=STEPS):
        average.abort_task()
    assert not average.statistics
    with average.task(net, steps=STEPS):
        average.abort_task()
        average.begin_task(net, STEPS)
    assert average.steps == STEPS, "another task that was begun within"
    average.abort_task()


def test_one_parameter_is_averaged_once() -> None:
    weight = graded()
    first, second = Constant(), PemaStep()
    first.begin_task({"w": weight}, 1)
    second.begin_task({"of the second": weight}, 1)
    first.update()
    second.update()
    with pytest.raises(UserError, match=r"'w' is also in a task of another average \(pema-step\) .* begun later"):
        first.end_task()
    second.end_task()
    for call in (first.update, first.end_task, first.swap_in):
        with pytest.raises(UserError, match=r"one more|has ended a task over 'of the second'"):
            call()
    first.abort_task()
    with first.task({"w": weight}, steps=1):
        first.update()


def test_an_aborted_or_dropped_task_and_no_average_are_no_rivals() -> None:
    weight = graded()
    first, second, plain = Constant(), Pema(), NoAverage()
    for average in (first, second, plain):
        average.begin_task({"w": weight}, 1)
        average.update()
    second.abort_task()
    dropped = Pema()
    dropped.begin_task({"w": weight}, 1)  # in a cycle of references, as every open Pema
    del dropped
    first.end_task()
    plain.end_task()
    gc.collect()


def test_what_another_average_has_swapped_in_is_not_trained_on() -> None:
    weight = graded()
    first, second = Constant(), PemaStep()
    first.begin_task({"w": weight}, 2)
    second.begin_task({"w": weight}, 2)
    with first.for_eval():
        for call in (second.update, second.end_task, second.swap_in):
            with pytest.raises(UserError, match=r"another average \(constant\) is swapped in to 'w'; swap it out"):
                call()
        with pytest.raises(UserError, match="begin_task: another average"):
            Pema().begin_task({"w": weight}, 1)
    second.update()


def test_merged_adapters_are_not_averaged() -> None:
    layer = nn.Linear(2, 2)
    vars(layer)["merged"] = True  # as cnext's and PEFT's layers have it
    with pytest.raises(UserError, match=r"begin_task: the adapters of 0 are merged .* unmerge them first"):
        Pema().begin_task(nn.Sequential(layer), 1)
    layer.requires_grad_(False)
    Pema().begin_task(nn.Sequential(layer, nn.Linear(2, 2)), 1)


@pytest.mark.parametrize("kind", ["weight_norm", "parametrization"])
def test_normalized_weights_are_averaged_by_their_parts(kind: str) -> None:
    """The weight itself is computed from them: after a task it is that of the averages."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older one
        make = nn.utils.weight_norm if kind == "weight_norm" else nn.utils.parametrizations.weight_norm
        net = nn.Sequential(make(nn.Linear(5, 4)), nn.Linear(4, 3))
    average = Constant(beta=0.5)
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with average.task(net, steps=1):
        net(torch.ones(2, 5)).square().sum().backward()
        average.update()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1.0)
    assert all(torch.allclose(p, start[name] + 0.5) for name, p in net.named_parameters())
    size, direction = (p for name, p in net.named_parameters() if name.startswith("0.") and "bias" not in name)
    x = torch.randn(2, 5)
    weight = size * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(net[0](x), x @ weight.T + dict(net.named_parameters())["0.bias"])
