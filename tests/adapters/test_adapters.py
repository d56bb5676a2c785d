"""Branch roles, `AdapterLinear`, and attaching, activating, training and detaching branches."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cnext import adapters
from cnext.adapters import BRANCH_ROLES, AdapterLinear, Branch, roles_of
from cnext.errors import UserError


@pytest.mark.parametrize(
    ("reads", "writes", "expected"),
    [
        (("text", "image"), ("text",), {"text-general", "image-general", "text-expert"}),
        (("text",), ("image",), {"text-general", "image-expert"}),
        (("text", "image"), ("image",), {"text-general", "image-general", "image-expert"}),
        (("text",), ("text", "image"), {"text-general", "text-expert", "image-expert"}),
    ],
    ids=["comprehension", "generation", "editing", "interleaved"],
)
def test_roles_of_a_task(reads: tuple, writes: tuple, expected: set) -> None:
    """The released freeze table: all but 3 trained for comprehension, 0 and 3 for Flickr30k, all but 2 for HQEdit."""
    assert {role.name for role in roles_of(reads, writes)} == expected


def test_roles_keep_the_released_order() -> None:
    assert [role.name for role in BRANCH_ROLES] == ["text-general", "image-general", "text-expert", "image-expert"]


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(ValueError, match="unknown modality 'audio'; valid: text, image"):
        roles_of(("audio", "text"), ("text",))


def filled(out_features: int, in_features: int, ranks: dict[str, int], **options: float) -> AdapterLinear:
    branches = {name: Branch(torch.randn(rank, in_features), out_features) for name, rank in ranks.items()}
    for branch in branches.values():
        nn.init.normal_(branch.B)
    return AdapterLinear(nn.Linear(in_features, out_features), branches, **options)


@pytest.mark.parametrize("ranks", [{"a": 8}, {"a": 8, "b": 8, "c": 8, "d": 8}, {"a": 1, "b": 5}], ids=["1", "4", "odd"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)], ids=str)
def test_the_formula(ranks: dict[str, int], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = filled(5, 7, ranks, scale=0.5).double(), torch.randn(shape, dtype=torch.float64)
    expected = F.linear(x, layer.base.weight, layer.base.bias)
    for branch in layer.branches.values():
        expected = expected + 0.5 * (x @ branch.A.T) @ branch.B.T
    torch.testing.assert_close(layer(x), expected)


def test_a_frozen_branch_adds_to_the_output_and_gets_no_gradient() -> None:
    torch.manual_seed(0)
    layer, x = filled(5, 7, {"frozen": 2, "live": 2}), torch.randn(3, 7)
    layer.requires_grad_(False)
    layer.branches["live"].requires_grad_(True)
    before = layer(x)
    before.sum().backward()
    assert layer.branches["frozen"].A.grad is None
    assert layer.branches["live"].A.grad.abs().sum() > 0
    with torch.no_grad():
        layer.branches["frozen"].B.zero_()
    assert not torch.equal(layer(x), before)


def test_dropout_acts_on_the_branches_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = filled(5, 7, {"a": 4}, dropout=0.5), torch.randn(64, 7)
    base = layer.base(x)
    assert torch.equal(layer.eval()(x), layer(x))
    dropped = layer.train()(x)
    assert not torch.equal(dropped, layer.eval()(x))
    with torch.no_grad():
        layer.branches["a"].B.zero_()
    assert torch.equal(layer.train()(x), base), "the base must see x whole"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(6, 6), nn.Linear(6, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v_proj(self.q_proj(x)))


def test_attach_keeps_outputs_and_detach_restores_the_model() -> None:
    model, x = Toy(), torch.randn(3, 6)
    original, before = copy.deepcopy(model.state_dict()), model(x)
    adapters.attach(model, ("q_proj", "v_proj"), {"a": 2, "b": 3})
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(model).values():
            parameter.normal_()
    assert not torch.equal(model(x), before)
    adapters.detach(model)
    assert torch.equal(model(x), before)
    assert original.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": {"a": 2, "b": 0}}, "rank of branch b must be at least 1, got 0"),
        ({"ranks": {"a": 2}, "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"ranks": {"a": 2}, "dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ],
    ids=["rank", "all dropped", "negative"],
)
def test_values_out_of_range_raise_and_change_nothing(options: dict, message: str) -> None:
    model = Toy()
    with pytest.raises(ValueError, match=message):
        adapters.attach(model, ("q_proj",), **options)
    assert not adapters.layers(model)


def test_initial_values_depend_on_the_total_rank_only() -> None:
    one, four = Toy(), Toy()
    for model, ranks in ((one, {"lora": 8}), (four, dict.fromkeys("abcd", 2))):
        adapters.attach(model, ("q_proj",), ranks, generator=torch.Generator().manual_seed(3))
    whole = adapters.layers(one)["q_proj"].branches["lora"].A
    parts = torch.cat([branch.A for branch in adapters.layers(four)["q_proj"].branches.values()])
    assert torch.equal(whole, parts)
    assert whole.abs().max() <= 6**-0.5


def test_set_trainable_unfreezes_only_the_named_branches() -> None:
    model = adapters.attach(Toy(), ("q_proj", "v_proj"), {"a": 2, "b": 3})
    chosen = adapters.set_trainable(model, ["b"])
    assert set(chosen) == {f"{layer}.b.{part}" for layer in ("q_proj", "v_proj") for part in "AB"}
    live = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert live == {id(parameter) for parameter in chosen.values()}


TAKES_BRANCHES: dict[str, Callable[[nn.Module, Any], object]] = {
    "branch_parameters": adapters.branch_parameters,
    "set_trainable": adapters.set_trainable,
    "activate": adapters.activate,
    "activated": lambda model, branches: adapters.activated(model, branches).__enter__(),
}


@pytest.mark.parametrize("function", TAKES_BRANCHES.values(), ids=TAKES_BRANCHES.keys())
@pytest.mark.parametrize(
    ("ranks", "branches", "message"),
    [
        ({"text-general": 2, "b": 1}, ["b", "text_general"], "unknown branch 'text_general'; valid: text-general, b"),
        ({"a": 2}, ["c", "a", "b"], "unknown branch 'c, b'; valid: a"),
        ({"a": 2}, "ab", "branches must be a list of names, got the text 'ab'; valid: a"),
        ({}, ["a"], "unknown branch 'a'; valid: none: the model has no adapter layers"),
    ],
    ids=["one", "two", "a text", "no adapter layers"],
)
def test_unknown_branches_raise_and_change_nothing(
    function: Callable[[nn.Module, Any], object], ranks: dict[str, int], branches: Any, message: str
) -> None:
    model = adapters.attach(Toy(), ("q_proj", "v_proj"), ranks) if ranks else Toy()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError, match=re.escape(message)):
        function(model, branches)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(layer.active == tuple(ranks) for layer in adapters.layers(model).values())


@pytest.mark.parametrize("function", TAKES_BRANCHES.values(), ids=TAKES_BRANCHES.keys())
def test_no_branches_are_valid_for_any_model(function: Callable[[nn.Module, Any], object]) -> None:
    assert not adapters.set_trainable(Toy(), [])
    function(Toy(), [])


def test_layers_activate_the_branches_that_they_have() -> None:
    model, x = Toy(), torch.randn(3, 6)
    adapters.attach(model, ("q_proj",), {"a": 2, "b": 2})
    adapters.attach(model, ("v_proj",), {"b": 2, "c": 2})
    with torch.no_grad():
        for parameter in adapters.branch_parameters(model).values():
            parameter.normal_()
    adapters.activate(model, ["c", "b"])
    assert [layer.active for layer in adapters.layers(model).values()] == [("b",), ("c", "b")]
    without_a = model(x)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(model, ["a"]).values():
            parameter.zero_()
    adapters.activate(model, ["a", "b", "c"])
    torch.testing.assert_close(model(x), without_a)
    assert set(adapters.set_trainable(model, ["c"])) == {"v_proj.c.A", "v_proj.c.B"}
