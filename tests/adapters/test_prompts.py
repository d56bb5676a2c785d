"""Soft prompts in front of a decoder: by hand, with and without a cache, and gone without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnext.adapters.prompts import Prompts
from cnext.backbones.tiny.model import TinyBackbone, pixels
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample


@pytest.fixture
def prompts(tiny: TinyBackbone) -> Prompts:
    return Prompts(tiny.language_model, 20_000, 5, 2, 3.0, torch.Generator().manual_seed(0))


def samples(data: Path, *tasks: str) -> list[Sample]:
    return [s for task in tasks for s in formats.read_samples(suites.load("next-tiny").task(task), data, "test")[:3]]


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
    token, chosen = tiny.tokenizer, torch.tensor([[3, 17]])
    mixed = samples(data, "VQAv2", "RefCOCO", "Flickr30k")
    with prompts.before(chosen):
        answers = tiny.generate(mixed, 20)
    plain = tiny.generate(mixed, 20)
    assert [a.text for a in answers] != [a.text for a in plain], "the prompts matter"
    front = (3 * prompts.prompts[chosen]).flatten(1, 2)
    for sample, answer in zip(mixed, answers, strict=True):
        features, ids, written = (
            tiny.features([pixels(sample.image)])[0] if sample.image else None,
            tiny.prompt(sample),
            [],
        )
        for _ in range(20):
            tokens = torch.tensor([ids + written])
            embeddings, _ = tiny._embed(tokens, [features], [False], tokens < 0)
            with torch.no_grad():
                hidden = tiny.decoder.model(inputs_embeds=torch.cat([front, embeddings], 1)).last_hidden_state
                logits = tiny.decoder.lm_head(hidden[0, -1])
            logits[[token["<pad>"], token["<s>"], token["<patch>"]]] = -torch.inf
            written.append(int(logits.argmax()))
            if written[-1] in (token["</s>"], token["<img>"]):
                break
        assert token.decode(written) == answer.text
        assert (written[-1] == token["<img>"]) == (answer.image is not None)


def test_positions_are_of_the_input_alone(tiny: TinyBackbone, prompts: Prompts, data: Path) -> None:
    encoded = tiny.encode(formats.read_samples(suites.load("next-tiny").task("HQEdit"), data, "train")[:3])
    tiny.output(encoded)
    expected = tiny.positions
    with prompts.before(torch.tensor([[0, 1]])):
        tiny.output(encoded)
    assert torch.equal(tiny.positions, expected)


def test_without_prompts_the_model_is_as_it_was(tiny: TinyBackbone, prompts: Prompts, data: Path) -> None:
    """To the bit, before and after, also where what was inside failed; and it has no parameter more."""
    mixed, base = samples(data, "VQAv2", "HQEdit"), TinyBackbone.load()
    encoded = base.encode(formats.read_samples(suites.load("next-tiny").task("VQAv2"), data, "train")[:3])
    with pytest.raises(RuntimeError, match="size"), prompts.before(torch.zeros(2, 2, dtype=torch.int64)):
        tiny.output(encoded)
    assert torch.equal(tiny.output(encoded).logits, base.output(encoded).logits)
    assert [a.text for a in tiny.generate(mixed, 8)] == [a.text for a in base.generate(mixed, 8)]
    assert tiny.state_dict().keys() == base.state_dict().keys()
