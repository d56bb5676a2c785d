"""Fisher information in each unit, against loops written out."""

import copy

import pytest
import torch
from torch import nn

from cnext.averaging import UNITS, FisherAccumulator, Pema
from cnext.errors import UserError


def setup(unit):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    parameters = dict(net.named_parameters())
    fisher = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    accumulator = FisherAccumulator(unit)
    accumulator.open(parameters, fisher, lambda: True)
    return net, fisher, accumulator


def losses(net, x):
    return (net(x) - 1).square().sum(1)


def squares(net, x, size):
    """The sum over chunks of ``size`` samples of the squared gradient of their mean loss, one autograd call each."""
    net = copy.deepcopy(net)  # without the hooks
    total = [torch.zeros_like(p) for p in net.parameters()]
    for chunk in x.split(size):
        found = torch.autograd.grad(losses(net, chunk).mean(), list(net.parameters()))
        total = [a + g.square() for a, g in zip(total, found, strict=True)]
    return total


def feed(net, accumulator, x, micro_batches=1):
    """One step: the backward passes, then the accumulator."""
    for chunk in x.chunk(micro_batches):
        if accumulator.unit == "sample":
            accumulator.step(losses(net, chunk))
        (losses(net, chunk).mean() / (1 if accumulator.unit == "micro-batch" else micro_batches)).backward()
    if accumulator.unit != "sample":
        accumulator.step(None)
    net.zero_grad()


@pytest.mark.parametrize(("unit", "micro_batches", "size"), [("step", 1, 8), ("micro-batch", 4, 2), ("sample", 1, 1)])
def test_unit_is_what_its_name_says(unit, micro_batches, size):
    net, fisher, accumulator = setup(unit)
    x = torch.randn(8, 3)
    feed(net, accumulator, x, micro_batches)
    for value, expected in zip(fisher.values(), squares(net, x, size), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("unit", UNITS)
def test_accumulated_batches_are_one_batch_except_by_micro_batch(unit):
    x = torch.randn(8, 3)
    sums = []
    for micro_batches in (1, 4):
        net, fisher, accumulator = setup(unit)
        feed(net, accumulator, x, micro_batches)
        sums.append(torch.cat([f.flatten() for f in fisher.values()]))
    assert torch.allclose(*sums, rtol=1e-5) == (unit != "micro-batch")


def test_the_square_of_a_mean_is_not_the_mean_of_squares():
    x = torch.randn(64, 3)
    values = {}
    for unit in ("step", "sample"):
        net, fisher, accumulator = setup(unit)
        feed(net, accumulator, x)
        values[unit] = fisher["weight"].sum()
    assert values["step"] < 0.9 * values["sample"] / 64


@pytest.mark.parametrize("unit", UNITS)
def test_pema_reads_the_second_half_in_its_unit(unit):
    torch.manual_seed(0)
    net, average = nn.Linear(3, 2), Pema(unit=unit)
    average.begin_task(dict(net.named_parameters()), 4)
    x = torch.randn(4, 6, 3)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(4):
        batch = losses(net, x[step])
        if unit == "sample":
            average.update(batch)
        batch.mean().backward()
        if unit != "sample":
            average.update()
        net.zero_grad()
        if step >= 2:
            size = 1 if unit == "sample" else 6
            expected = [a + b for a, b in zip(expected, squares(net, x[step], size), strict=True)]
    for value, total in zip(average.fisher_new.values(), expected, strict=True):
        torch.testing.assert_close(value, total)
    average.end_task()
    losses(net, x[0]).sum().backward()  # no hook is left behind


def test_misuse_is_refused():
    with pytest.raises(UserError, match="unknown unit 'batch'; valid: step, micro-batch, sample"):
        FisherAccumulator("batch")
    net, _, accumulator = setup("sample")
    with pytest.raises(UserError, match=r"expects the samples' losses, \(batch,\); got none"):
        accumulator.step(None)
    _, _, accumulator = setup("step")
    with pytest.raises(UserError, match="no parameter has a gradient; expected a step after its backward pass"):
        accumulator.step()
    with pytest.raises(UserError, match="expects no losses; got losses"):
        accumulator.step(losses(net, torch.ones(1, 3)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("processes", [None, 1, 2])
def test_several_processes_read_reduced_gradients_alone(unit, processes, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes is not None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes or pytest.fail("there is no group"))
    if unit == "step" or processes != 2:
        setup(unit)
        return
    with pytest.raises(UserError, match=f"unit '{unit}' reads gradients before their reduction.*use unit 'step'"):
        setup(unit)


def test_sums_of_another_dtype_are_refused_before_the_task():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"fisher\[0\] has dtype torch.float64; expected torch.float32"):
        FisherAccumulator().open({"w": weight}, {"w": torch.zeros(2, dtype=torch.float64)})
