"""Adapters on weights that several layers own, and on one layer at several places: merging, its reverse, detaching."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.test_attach_mage import TEXT, logits, model
from torch import Tensor, nn

import cnext
from cnext import adapters
from cnext.adapters.exchange import merged
from cnext.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def head_tied(toy: Toy) -> None:
    toy.head.weight = toy.words.weight


def weight_of_two_layers(toy: Toy) -> None:
    toy.layers[2].q_proj.weight = toy.layers[0].q_proj.weight


def square_of_one_layer(toy: Toy) -> None:
    toy.layers[1].v_proj.weight = toy.layers[1].q_proj.weight


def layer_at_two_places(toy: Toy) -> None:
    toy.layers[2].q_proj = toy.layers[0].q_proj


def layer_under_two_names(toy: Toy) -> None:
    toy.layers[1].v_proj = toy.layers[1].q_proj


def block_at_two_places(toy: Toy) -> None:
    toy.layers[2] = toy.layers[0]


def rows_of_one_matrix(toy: Toy) -> None:
    whole = torch.randn(12, 6)
    toy.layers[0].q_proj.weight, toy.layers[0].v_proj.weight = (nn.Parameter(part) for part in whole.split(6))
    toy.layers[1].q_proj.weight = nn.Parameter(whole[3:9])


SHARED = {
    made.__name__: made
    for made in (
        *(head_tied, weight_of_two_layers, square_of_one_layer, layer_at_two_places, layer_under_two_names),
        *(block_at_two_places, rows_of_one_matrix),
    )
}
IDS = torch.arange(9).view(3, 3)
every_kind = pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)


def shared_toy(share: Callable[[Toy], None]) -> Toy:
    torch.manual_seed(0)
    toy = Toy()
    share(toy)
    return toy


def adapted(share: Callable[[Toy], None]) -> Toy:
    toy = shared_toy(share)
    adapters.attach(toy, ("q_proj", "v_proj", "head"), {"a": 2, "b": 1})
    with torch.no_grad():
        for parameter in adapters.branch_parameters(toy).values():
            parameter.normal_(std=0.3)
    return toy


@torch.no_grad()
@every_kind
def test_merged_and_unmerged_compute_the_same_in_any_order(share: Callable[[Toy], None]) -> None:
    toy = adapted(share)
    apart = toy(IDS)
    weights = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    found = list(adapters.layers(toy).values())
    for layer in found:
        layer.merge()
        torch.testing.assert_close(toy(IDS), apart, rtol=1e-4, atol=1e-5)
    for order in (found, found[::-1], found[1::2] + found[::2]):
        for layer in order:
            layer.unmerge()
            torch.testing.assert_close(toy(IDS), apart, rtol=1e-4, atol=1e-5)
        assert torch.equal(toy(IDS), apart)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in toy.state_dict().items())
        for layer in found:
            layer.merge()


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("merged_before", [False, True])
def test_detaching_restores_what_is_shared(share: Callable[[Toy], None], merged_before: bool) -> None:
    toy, plain = adapted(share), shared_toy(share)
    before = {name: id(parameter) for name, parameter in plain.named_parameters(remove_duplicate=False)}
    same = {a: b for a, b in itertools.combinations(before, 2) if before[a] == before[b]}
    if merged_before:
        for layer in adapters.layers(toy).values():
            layer.merge()
    adapters.detach(toy)
    assert [type(m) for m in toy.modules()] == [type(m) for m in plain.modules()]
    own = dict(toy.named_parameters(remove_duplicate=False))
    assert own.keys() == before.keys()
    assert all(own[a] is own[b] for a, b in same.items())
    assert torch.equal(toy(IDS), plain(IDS))


@torch.no_grad()
@every_kind
@pytest.mark.parametrize("change", [copy.deepcopy, lambda toy: toy.double(), lambda toy: toy.bfloat16().double()])
def test_a_merged_model_is_copied_and_moved_with_its_weights(share: Callable[[Toy], None], change: Callable) -> None:
    toy = adapted(share)
    for layer in adapters.layers(toy).values():
        layer.merge()
    expected = toy(IDS).double()
    other = change(toy)
    torch.testing.assert_close(other(IDS).double(), expected, rtol=0.05, atol=0.05)
    for layer in adapters.layers(other).values():
        layer.unmerge()
    assert (other.head.base.weight is other.words.weight) == (share is head_tied)
    again = change(adapted(share))
    assert torch.equal(other(IDS), again(IDS))


def test_a_layer_at_two_places_is_one_adapter_layer() -> None:
    toy = adapted(layer_at_two_places)
    assert toy.layers[0].q_proj is toy.layers[2].q_proj
    assert len(adapters.layers(toy)) == 6
    toy(IDS).sum().backward()
    both = toy.layers[0].q_proj.branches["a"].B.grad.clone()
    toy.zero_grad()
    toy.layers[2].q_proj = copy.deepcopy(toy.layers[0].q_proj)
    toy(IDS).sum().backward()
    one, other = (toy.layers[place].q_proj.branches["a"].B.grad for place in (0, 2))
    torch.testing.assert_close(one + other, both)


def test_initial_values_do_not_depend_on_what_is_shared() -> None:
    toys = [shared_toy(share) for share in (head_tied, weight_of_two_layers)]
    for toy in toys:
        adapters.attach(toy, ("q_proj",), {"a": 2}, generator=torch.Generator().manual_seed(0))
    one, other = (adapters.branch_parameters(toy) for toy in toys)
    assert all(torch.equal(one[name], other[name]) for name in one)


@every_kind
def test_a_merged_copy_in_memory_is_refused_where_loading_would_tie_it(share: Callable[[Toy], None]) -> None:
    toy = adapted(share)
    if share in (head_tied, weight_of_two_layers, square_of_one_layer):
        with (
            pytest.raises(UserError, match=r"weights that several layers own: \S+ is \S+;"),
            merged(toy),
        ):
            pass
        assert len(adapters.layers(toy)) == 7
        return
    expected = toy(IDS)
    with torch.no_grad(), merged(toy):
        assert not adapters.layers(toy)
        torch.testing.assert_close(toy(IDS), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(toy(IDS), expected)


def tied_llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)).eval()


@torch.no_grad()
def test_a_head_that_is_tied_to_the_embeddings_of_a_language_model(tmp_path: Path) -> None:
    plain = tied_llama()
    before, words = logits(plain), plain.model.embed_tokens.weight.clone()
    handle = cnext.attach_mage(plain, targets=("lm_head", "q_proj"), language_model=plain, dropout=0.0)
    for parameter in adapters.branch_parameters(plain).values():
        parameter.normal_(std=0.1)
    apart = logits(plain)
    handle.merge()
    torch.testing.assert_close(logits(plain), apart, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.model.embed_tokens.weight, words)
    handle.unmerge()
    assert torch.equal(logits(plain), apart)
    with pytest.raises(UserError, match=r"lm_head"), merged(plain):
        pass
    handle.merge()
    assert torch.equal(logits(handle.detach()), before)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_a_layer_that_is_also_elsewhere_under_another_name_is_refused() -> None:
    toy = shared_toy(layer_at_two_places)
    toy.extra = toy.layers[1].q_proj
    with pytest.raises(UserError, match=r"layers.1.q_proj is the same module as extra, which no target names"):
        adapters.attach(toy, ("q_proj",), {"a": 2})
    assert not adapters.layers(toy)
    whole = model("janus")
    whole.model.outside = whole.model.language_model.layers[0].mlp.up_proj
    with pytest.raises(
        UserError, match=r"layers.0.mlp.up_proj: the model has this layer outside of its language model"
    ):
        cnext.attach_mage(whole)
    assert not adapters.layers(whole)


def test_merging_in_inference_mode_leaves_a_model_that_can_train() -> None:
    toy = adapted(head_tied)
    with torch.inference_mode():
        for layer in adapters.layers(toy).values():
            layer.merge()
    assert not toy.head.base.weight.is_inference()
    toy.layers[0].q_proj.unmerge()
    toy(IDS).sum().backward()
    assert toy.layers[0].q_proj.branches["a"].B.grad is not None
