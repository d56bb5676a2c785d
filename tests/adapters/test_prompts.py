"""Soft prompts: outputs with and without a cache, and an unchanged model without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones.test_tiny import assert_greedy, samples

from cnext.adapters.prompts import Prompts
from cnext.backbones.tiny.model import TinyBackbone


@pytest.fixture
def prompts(tiny: TinyBackbone) -> Prompts:
    return Prompts(tiny.language_model, 20_000, 5, 2, 3.0, torch.Generator().manual_seed(0))


def test_prompts_start_at_the_size_of_the_embeddings(tiny: TinyBackbone, prompts: Prompts) -> None:
    assert prompts.prompts.shape == (26, 5, 128)
    assert prompts.keys.shape == (26, 128)
    size = tiny.language_model.embed_tokens.weight.std().item()
    assert (3 * prompts.prompts).std().item() == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("rows", [1, 4], ids=["same-for-all", "each-its-own"])
def test_output_by_hand(tiny: TinyBackbone, prompts: Prompts, rows: int) -> None:
    """The decoder's own states of prompts and input in one sequence, those of the prompts cut off; gradients too."""
    torch.manual_seed(0)
    inputs, chosen = torch.randn(4, 9, 128) / 10, torch.randint(26, (rows, 2))
    with prompts.before(chosen):
        found = tiny.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    found.square().sum().backward()
    pool = prompts.prompts.detach().clone().requires_grad_()
    front = torch.stack([torch.cat([3 * pool[number] for number in row]) for row in chosen]).expand(4, -1, -1)
    whole = tiny.language_model(inputs_embeds=torch.cat([front, inputs], 1), use_cache=False).last_hidden_state
    whole[:, 10:].square().sum().backward()
    torch.testing.assert_close(found, whole[:, 10:])
    torch.testing.assert_close(prompts.prompts.grad, pool.grad, rtol=1e-4, atol=1e-4)
    assert pool.grad.any()


def test_cached_generation_equals_computing_everything_again(tiny: TinyBackbone, prompts: Prompts, data: Path) -> None:
    """Token by token without a cache and without padding, the prompts put in by hand; pictures after <img> as well."""
    chosen = torch.tensor([[3, 17]])
    mixed = [s for task in ("VQAv2", "RefCOCO", "Flickr30k") for s in samples(data, task, "test")[:3]]
    with prompts.before(chosen):
        answers = tiny.generate(mixed, 20)
    plain = tiny.generate(mixed, 20)
    assert [a.text for a in answers] != [a.text for a in plain], "the prompts matter"
    front = (3 * prompts.prompts[chosen]).flatten(1, 2)
    for sample, answer in zip(mixed, answers, strict=True):
        assert_greedy(tiny, sample, answer, front)


def test_positions_are_of_the_input_alone(tiny: TinyBackbone, prompts: Prompts, data: Path) -> None:
    encoded = tiny.encode(samples(data, "HQEdit")[:3])
    tiny.output(encoded)
    expected = tiny.positions
    with prompts.before(torch.tensor([[0, 1]])):
        tiny.output(encoded)
    assert torch.equal(tiny.positions, expected)


def test_without_prompts_the_model_is_as_it_was(tiny: TinyBackbone, prompts: Prompts, data: Path) -> None:
    """To the bit, before and after, also where what was inside failed; and it has no parameter more."""
    mixed = [*samples(data, "VQAv2", "test")[:3], *samples(data, "HQEdit", "test")[:3]]
    base = TinyBackbone.load()
    encoded = base.encode(samples(data, "VQAv2")[:3])
    with pytest.raises(RuntimeError, match="size"), prompts.before(torch.zeros(2, 2, dtype=torch.int64)):
        tiny.output(encoded)
    assert torch.equal(tiny.output(encoded).logits, base.output(encoded).logits)
    assert [a.text for a in tiny.generate(mixed, 8)] == [a.text for a in base.generate(mixed, 8)]
    assert tiny.state_dict().keys() == base.state_dict().keys()
