"""MoELoRA: the forward pass and every gradient against plain double precision, and a router that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import Sequence, train_rest

from cnext import adapters
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.lora import Lora
from cnext.methods.moelora import MoeLora


@pytest.fixture
def layer(tiny: TinyBackbone) -> adapters.AdapterLinear:
    """A layer of the method with random branches and a random router."""
    method = MoeLora(scale=0.5)
    generator = torch.Generator().manual_seed(0)
    method.setup(tiny, [], generator)
    method.trainable(None)
    layer = adapters.layers(tiny.language_model)["layers.0.mlp.down_proj"]
    with torch.no_grad():
        for parameter in (*layer.branches.parameters(), layer.router.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return layer


def test_output_and_gradients_against_plain_double_precision(layer: adapters.AdapterLinear) -> None:
    x = torch.randn(3, 5, 344, requires_grad=True)
    wide = {name: p.detach().double().requires_grad_() for name, p in layer.adapter_parameters()}
    x64, weight = x.detach().double().requires_grad_(), layer.base.weight.double()
    gates = (x64 @ wide["router.weight"].T).softmax(-1)
    expected = x64 @ weight.T
    for e in range(4):
        expected = expected + 0.5 * gates[..., e, None] * (x64 @ wide[f"expert-{e}.A"].T @ wide[f"expert-{e}.B"].T)
    y = layer(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(y.shape)
    (y * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.adapter_parameters():
        assert parameter.grad.abs().max() > 1e-3, name
        torch.testing.assert_close(parameter.grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)


def test_gates_sum_to_one(layer: adapters.AdapterLinear) -> None:
    gates = layer.router(100 * torch.randn(7, 344))
    assert gates.shape == (7, 4)
    torch.testing.assert_close(gates.sum(-1), torch.ones(7))


def test_one_expert_is_lora(tiny: TinyBackbone) -> None:
    other = TinyBackbone.load()
    ids = torch.arange(20)[None]
    outputs = []
    for backbone, method in ((tiny, MoeLora(experts=1, rank=32, scale=1.0)), (other, Lora(scale=1.0))):
        method.setup(backbone, [], torch.Generator().manual_seed(0))
        with torch.no_grad():
            for branch in adapters.branch_parameters(backbone.language_model).values():
                branch.add_(0.01)
            outputs.append(backbone.language_model(ids).last_hidden_state)
    torch.testing.assert_close(*outputs)


def test_routers_learn_on_every_task(data: Path) -> None:
    sequence = Sequence("moelora", data)
    for task in ("VQAv2", "Flickr30k"):
        trainer = sequence.open(task)
        before = {key: p.detach().clone() for key, p in sequence.parameters.items() if ".router." in key}
        train_rest(trainer)
        assert len(before) == 28
        for key, old in before.items():
            old, new = old.flatten().double(), sequence.parameters[key].detach().flatten().double()
            turned = new - (new @ old) / (old @ old) * old
            assert turned.norm() > 1e-2 * old.norm(), "weight decay alone would only shorten it"


def test_parameters_are_those_of_lora_and_the_routers(tiny: TinyBackbone) -> None:
    """4 layers of 6 x 128 and 344 inputs, 4 experts each."""
    method = MoeLora()
    method.setup(tiny, [], torch.Generator().manual_seed(0))
    routers = [p.numel() for key, p in method.adapter_parameters().items() if ".router." in key]
    assert sum(p.numel() for p in method.adapter_parameters().values()) - sum(routers) == 312_320
    assert sum(routers) == 4 * 4 * (6 * 128 + 344)
    assert method.extra_bytes(6) == 4 * sum(routers)


def test_starts_with_the_values_of_lora(tiny: TinyBackbone) -> None:
    """Routers are drawn after the branches, from the given generator and not from torch's global one."""
    other = TinyBackbone.load()
    MoeLora().setup(tiny, [], torch.Generator().manual_seed(0))
    Lora().setup(other, [], torch.Generator().manual_seed(0))
    mine, plain = (adapters.layers(b.language_model) for b in (tiny, other))
    for name, layer in mine.items():
        rows = torch.cat([branch.A for branch in layer.branches.values()])
        assert torch.equal(rows, plain[name].branches["lora"].A)
        assert 0.9 * layer.base.in_features**-0.5 < layer.router.weight.abs().max() <= layer.base.in_features**-0.5
