"""Layers that read the same input are computed together, and give what they give apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cnext import adapters, ops
from cnext.adapters.linear import SharedInput


class Attention(nn.Module):
    """Three projections of one input, of unequal widths as in grouped-query attention, and one of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4, bias=False)
        self.o_proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.q_proj(x) * torch.cat([k, v], -1))


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def made(shared: tuple = adapters.SHARED, dropout: float = 0.0) -> Attention:
    torch.manual_seed(0)
    model = Attention()
    generator = torch.Generator().manual_seed(1)
    adapters.attach(model, TARGETS, {"a": 2, "b": 3}, dropout=dropout, shared=shared, generator=generator)
    with torch.no_grad():
        for name, parameter in adapters.branch_parameters(model).items():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def results(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    y = (run or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in adapters.branch_parameters(model).values())]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(2))


def test_outputs_and_gradients_are_those_of_the_layers_alone(x: Tensor) -> None:
    for one, other in zip(results(made(), x), results(made(shared=()), x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_three_layers_are_one_call(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grouped = ops.lora_branches_grouped

    def counted(x: Tensor, weights: list, *rest: object, **options: object) -> object:
        calls.append(len(weights))
        return grouped(x, weights, *rest, **options)

    monkeypatch.setattr(ops, "lora_branches_grouped", counted)
    made()(x)
    assert calls == [3], "q, k and v together; the output projection goes by the single op"


def test_nothing_waits_after_a_pass(x: Tensor) -> None:
    model = made()
    model(x)
    assert model.q_proj.shared is model.v_proj.shared
    assert model.o_proj.shared is None
    assert (model.q_proj.shared._x, model.q_proj.shared._waiting) == (None, {})


def test_another_input_is_never_answered_with_what_waits(x: Tensor) -> None:
    model, alone, other = made(), made(shared=()), x + 1
    model.q_proj(x)
    for layer in ("k_proj", "v_proj"):
        torch.testing.assert_close(getattr(model, layer)(other), getattr(alone, layer)(other))
    torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))


def test_an_input_changed_in_place_is_computed_again(x: Tensor) -> None:
    model, alone = made(), made(shared=())
    with torch.no_grad():
        model.q_proj(x)
        x += 1
        torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))


def test_a_branch_changed_between_two_layers_is_computed_again(x: Tensor) -> None:
    """As by an optimizer's step, with the same tensor for x."""
    model, alone = made(), made(shared=())
    for one in (model, alone):
        one.q_proj(x)
        with torch.no_grad():
            one.k_proj.branches["a"].B.add_(1)
    torch.testing.assert_close(model.k_proj(x), alone.k_proj(x))


def test_inference_mode_counts_no_versions(x: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(made()(x.clone()), made(shared=())(x.clone()))


def test_a_recomputed_pass_makes_the_same_mask(x: Tensor) -> None:
    model = made(dropout=0.5)
    torch.manual_seed(3)
    plain = results(model, x)
    model.zero_grad()
    torch.manual_seed(3)
    again = results(model, x, lambda value: checkpoint(model, value, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_merged_routed_and_switched_off_layers_leave_the_group(x: Tensor) -> None:
    model, alone = made(), made(shared=())
    for layer in (model.k_proj, alone.k_proj):
        layer.merge()
    for layer in (model.v_proj, alone.v_proj):
        layer.router = lambda value: torch.full((*value.shape[:-1], 2), 0.5)
    torch.testing.assert_close(model(x), alone(x))
    for one in (model, alone):
        one.v_proj.router = None
        one.k_proj.unmerge()
        adapters.activate(one, ["b"])
    torch.testing.assert_close(model(x), alone(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch before 2.9's own
def test_compiles_into_one_graph(x: Tensor) -> None:
    compiled = torch.compile(made(), backend="aot_eager", fullgraph=True)
    for one, other in zip(results(compiled, x), results(made(), x), strict=True):
        torch.testing.assert_close(one, other)


def test_only_siblings_are_grouped() -> None:
    model = nn.ModuleDict({"one": Attention(), "two": Attention()})
    adapters.attach(model, TARGETS, {"a": 2})
    assert isinstance(model["one"].q_proj.shared, SharedInput)
    assert model["one"].q_proj.shared is not model["two"].q_proj.shared
    assert model["one"].q_proj.shared.layers == (model["one"].q_proj, model["one"].k_proj, model["one"].v_proj)
