"""The embedded model's decoder gives transformers' numbers, to the bit, and is shared with a model of transformers."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cnext import adapters, methods
from cnext.backbones.base import outer_model
from cnext.backbones.pretrained import checkpoint_activations
from cnext.backbones.tiny.decoder import Cache, Config, Llama, as_transformers
from cnext.backbones.tiny.model import TinyBackbone
from cnext.kv_cache import cache_argument

CONFIG = Config(50, 32, 40, 2, 4, 64, 1, 2, 0)


@pytest.fixture
def pair() -> tuple[Llama, LlamaForCausalLM]:
    """The same seed, so the same initial values."""
    torch.manual_seed(0)
    ours = Llama(CONFIG)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**asdict(CONFIG), tie_word_embeddings=False))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    return ours, theirs


def gradients(model: nn.Module, hidden: Tensor) -> list[Tensor]:
    hidden.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_gradients_are_those_of_transformers(
    pair: tuple[Llama, LlamaForCausalLM], checkpointing: bool, dtype: torch.dtype
) -> None:
    inputs, found = torch.randn(3, 9, 32, dtype=dtype), []
    for one in pair:
        model = one.train()
        for parameter in model.parameters():  # without the rotary frequencies
            parameter.data = parameter.data.to(dtype)
        if checkpointing:
            checkpoint_activations(model)
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        found.append([hidden, *gradients(model.model, hidden)])
    assert len(found[0]) == 1 + 2 * 9 + 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_generation_with_padding_is_that_of_transformers(pair: tuple[Llama, LlamaForCausalLM]) -> None:
    """A first pass over rows padded on the left, one position, and several more with and without padding."""
    inputs = torch.randn(2, 9, 32)
    for padded in (0, 2):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :padded] = 0
        positions, found = (mask.cumsum(1) - 1).clamp(min=0), []
        for model, cache in zip(pair, (Cache(), DynamicCache(config=pair[1].config)), strict=True):
            passes = [
                model.model(
                    inputs_embeds=inputs[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    use_cache=True,
                    **{cache_argument(model.model): cache},
                ).last_hidden_state[:, -1]
                for start, end in ((0, 5), (5, 6), (6, 9))
            ]
            assert cache.get_seq_length() == 9
            found.append(passes)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_ids_are_taken_and_positions_follow_the_cache(pair: tuple[Llama, LlamaForCausalLM]) -> None:
    ours, cache, ids = pair[0], Cache(), torch.arange(6)[None]
    whole = ours.model(ids).last_hidden_state
    parts = [ours.model(ids[:, start:end], cache=cache).last_hidden_state for start, end in ((0, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_model_of_transformers_shares_the_layers(tiny: TinyBackbone) -> None:
    made = methods.load("mage-paper")()
    made.setup(tiny, [], torch.Generator().manual_seed(0))
    model = outer_model(tiny)
    assert isinstance(model, LlamaForCausalLM)
    assert model.state_dict().keys() == tiny.decoder.state_dict().keys()
    assert {*adapters.layers(model).values()} == {*adapters.layers(tiny).values()}
    assert all(one is other for one, other in zip(model.parameters(), tiny.decoder.parameters(), strict=True))
    ids = torch.tensor([[1, 20, 30, 40]])
    assert torch.equal(model(input_ids=ids).logits, tiny.logits_model()(ids).logits)
    assert torch.equal(model(input_ids=ids).logits, tiny.lm_head(tiny.language_model(ids).last_hidden_state))


def test_layers_that_read_one_input_are_computed_together(tiny: TinyBackbone) -> None:
    methods.load("mage")().setup(tiny, [], torch.Generator().manual_seed(0))
    together = adapters.joined(tiny.language_model)
    assert together["layers.0.self_attn"] == (("q_proj", "k_proj", "v_proj"),)
    assert together["layers.0.mlp"] == (("gate_proj", "up_proj"),)


def test_a_wide_layer_is_sized_as_configured() -> None:
    sizes = {name: tuple(one.shape) for name, one in as_transformers(Llama(CONFIG)).named_parameters()}
    assert sizes["model.layers.1.mlp.down_proj.weight"] == (32, 40)
    assert sizes["lm_head.weight"] == (50, 32)
