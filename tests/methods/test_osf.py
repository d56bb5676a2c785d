"""OSF: its layer against PEFT's, the split and the schedule, and that no step moves along a high direction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import RECIPE, TASKS, Sequence, opened, train_rest
from peft import OSFConfig
from peft.tuners.osf.layer import Linear
from torch import nn

from cnext.adapters.osf import OsfLayer, attach_osf
from cnext.errors import UserError
from cnext.methods.osf import Osf

SHAPES = [(12, 12), (20, 12), (12, 20)]


def pair(shape: tuple[int, int], trained: int) -> tuple[nn.Linear, OsfLayer, Linear]:
    """A linear layer, ours beside it, and PEFT's around it, with the same low directions trained."""
    torch.manual_seed(0)
    out, width = shape
    base = nn.Linear(width, out)
    ours = OsfLayer(base, trained)
    ours.split(trained)
    theirs = Linear(base, "default", OSFConfig(), effective_rank=min(shape) - trained)
    return base, ours, theirs


def layer_of(weight: torch.Tensor, rank: int) -> OsfLayer:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight = nn.Parameter(weight)
    return OsfLayer(base, rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("trained", [4, 11])
def test_output_and_projected_gradients_are_those_of_peft(shape: tuple[int, int], trained: int) -> None:
    """From other values than the starting ones. Singular vectors are unique but for their sign."""
    base, ours, theirs = pair(shape, trained)
    low = theirs.osf_svd_params["default"]
    signs = (ours.U.detach() * low["U_low"].detach()).sum(0).sign()
    moved = [torch.randn_like(p) * 0.1 for p in (ours.U, ours.S, ours.V)]
    with torch.no_grad():
        for parameter, change in zip((ours.U, ours.S, ours.V), moved, strict=True):
            parameter.add_(change)
        for name, value in (("U_low", ours.U * signs), ("S_low", ours.S), ("V_low", ours.V * signs[:, None])):
            low[name].copy_(value)
    x, weight = torch.randn(3, 5, shape[1]), torch.randn(3, 5, shape[0])
    y = base(x) + ours(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)
    (weight * y).sum().backward()
    (weight * theirs(x)).sum().backward()
    found = ours.project(ours.U.grad, ours.S.grad, ours.V.grad)
    expected = (low["U_low"].grad * signs, low["S_low"].grad, low["V_low"].grad * signs[:, None])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert (found[0] - ours.U.grad).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_split_is_the_weight(shape: tuple[int, int]) -> None:
    """Nothing is added at the start, to the bit; high and low directions are the weight's, high ones the larger."""
    torch.manual_seed(0)
    layer = layer_of(weight := torch.randn(shape), 5)
    layer.split(3)
    assert not layer(torch.randn(4, shape[1])).any()
    high_u, high_v = layer.high
    assert high_u.shape[1] == high_v.shape[0] == min(shape) - 3
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(layer.S.detach(), values[-5:])
    high = high_u @ (high_u.T @ weight @ high_v.T) @ high_v
    low = (layer.U * layer.S)[:, -3:] @ layer.V[-3:]
    torch.testing.assert_close(high + low, weight, rtol=1e-4, atol=1e-5)


def test_columns_that_are_not_live_do_not_change() -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(9, 7), 5)
    layer.split(2)
    u, s, v = layer.project(torch.randn(9, 5), torch.randn(5), torch.randn(5, 7))
    assert not torch.cat([u[:, :3].flatten(), s[:3], v[:3].flatten()]).any()
    assert torch.cat([u[:, 3:].flatten(), s[3:], v[3:].flatten()]).all()
    assert (layer.U.detach()[:, :3].T @ u).abs().max() < 1e-6
    assert (v @ layer.V.detach()[:3].T).abs().max() < 1e-6


def test_merging_keeps_the_output_and_splits_what_the_weight_has_become() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(9, 7), torch.randn(4, 7)
    layer = layer_of(weight, 3)
    layer.split(3)
    for live in (2, 1):
        with torch.no_grad():
            for parameter in (layer.U, layer.S, layer.V):
                parameter.add_(torch.randn_like(parameter))
        before, whole = layer(x), weight + layer(torch.eye(7)).T
        layer.merge(live)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.S.detach(), torch.linalg.svdvals(whole.detach())[-3:], rtol=1e-4, atol=1e-5)


def test_no_step_moves_along_a_high_direction(data: Path) -> None:
    """Over three tasks, with Adam's rescaling and weight decay, also in columns that the schedule has frozen."""
    assert RECIPE.weight_decay > 0
    sequence = Sequence("osf", data)
    for task in TASKS:
        trainer = sequence.open(task)
        high = {name: layer.high for name, layer in sequence.method.layers.items()}
        start = {name: layer.start for name, layer in sequence.method.layers.items()}
        train_rest(trainer)
        for name, layer in sequence.method.layers.items():
            (high_u, high_v), (u, s, v) = high[name], start[name]
            moved = layer.U.detach() - u, layer.S.detach() - s, layer.V.detach() - v
            assert (high_u.T @ moved[0]).abs().max() < 1e-5
            assert (moved[2] @ high_v.T).abs().max() < 1e-5
            frozen = layer.rank - layer.live
            assert not torch.cat([moved[0][:, :frozen].flatten(), moved[1][:frozen], moved[2][:frozen].flatten()]).any()
            assert all(part.norm() > 1e-2 for part in moved)
        sequence.finish(trainer)


@pytest.mark.parametrize(("freeze", "expected"), [(0.0, [32, 32, 32]), (0.5, [32, 27, 21]), (1.0, [32, 21, 11])])
def test_the_trained_directions_shrink_with_the_tasks(data: Path, freeze: float, expected: list[int]) -> None:
    """As PEFT advises, task i of n trains a share of 1 - (i - 1) / n; never nothing, whatever comes after."""
    method = Sequence("osf", data, freeze=freeze).method
    found = []
    for method.learnt in range(3):
        found.append(method.live)
    assert found == expected
    method.learnt = 9
    assert method.live == expected[-1]


def test_a_weight_learns_what_it_learns_by_itself(data: Path) -> None:
    """The gradient of U, S and V is that of the weight itself, by the chain rule, in a model without the layers."""
    name = "layers.1.mlp.up_proj"
    sequence, trainer = opened("osf", data, TASKS[0])
    batch, layer = trainer.batches.at(0, 1), sequence.method.layers[name]
    plain = Sequence("zero-shot", data).tiny
    weight = plain.language_model.get_parameter(f"{name}.weight").requires_grad_()
    (g,) = torch.autograd.grad(plain.loss(batch).total, [weight])
    found = torch.autograd.grad(sequence.tiny.loss(batch).total, [layer.U, layer.S, layer.V])
    u, s, v = layer.start
    expected = (g @ v.T * s, ((u.T @ g) * v).sum(1), s[:, None] * (u.T @ g))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_transposed_weight_is_turned() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("c_fc", Conv1D(6, 4))
    layers = attach_osf(model, ["c_fc"], 2)
    layers["c_fc"].split(2)
    with torch.no_grad():
        layers["c_fc"].S.add_(1.0)
    x, (u, _, v) = torch.randn(3, 4), layers["c_fc"].start
    expected = x @ model.c_fc.weight + model.c_fc.bias + x @ (u @ v).T
    torch.testing.assert_close(model(x), expected)


def test_quantized_weights_are_refused() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential()
    model.add_module("proj", nn.Linear(32, 32))
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(
        UserError, match="the singular vectors of proj, whose weight is quantized or offloaded; load the model"
    ):
        attach_osf(model, ["proj"], 4)


def test_its_parameters_are_those_of_lora_for_any_rank_of_the_default(tiny) -> None:
    method = Osf()
    method.setup(tiny, [], torch.Generator())
    assert sum(p.numel() for p in method.adapter_parameters().values()) == 312_320 + 32 * len(method.layers)


def test_it_decomposes_the_weights_that_the_first_task_finds(data: Path) -> None:
    """Which are others than when it attached, where a run starts from a merged model."""
    sequence = Sequence("osf", data)
    with torch.no_grad():
        for parameter in sequence.tiny.language_model.parameters():
            parameter.mul_(1.5)
    expected = [answer.text for answer in sequence.tiny.generate(sequence.samples(TASKS[0])[:4], 4)]
    sequence.open(TASKS[0])
    weight = sequence.tiny.language_model.get_parameter("layers.0.mlp.up_proj.weight")
    layer = sequence.method.layers["layers.0.mlp.up_proj"]
    torch.testing.assert_close(layer.S.detach(), torch.linalg.svdvals(weight)[-32:], rtol=1e-4, atol=1e-5)
    sequence.tiny.eval()
    assert [answer.text for answer in sequence.tiny.generate(sequence.samples(TASKS[0])[:4], 4)] == expected
