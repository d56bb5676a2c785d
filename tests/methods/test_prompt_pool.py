"""Prompt pool: selection, gradients of prompts and keys, and generation with prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, Sequence, opened, questions
from torch.nn import functional as F

from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import UserError
from cnext.methods.prompt_pool import PromptPool


@pytest.fixture(scope="module")
def learnt(data: Path) -> Sequence:
    sequence = Sequence("prompt-pool", data)
    sequence.learn("VQAv2", "Flickr30k")
    sequence.tiny.eval()
    return sequence


@pytest.mark.parametrize("length", [1, 8, 16])
def test_as_many_parameters_as_lora(tiny: TinyBackbone, length: int) -> None:
    """The largest pool that fits, within 1%."""
    method = PromptPool(length=length)
    method.setup(tiny, [], torch.Generator().manual_seed(0))
    count = sum(parameter.numel() for parameter in method.adapter_parameters().values())
    assert 0.99 * 312_320 <= count <= 312_320


def test_choice_against_a_plain_loop(learnt: Sequence, data: Path) -> None:
    encoded = learnt.tiny.encode(questions(data, "VQAv2") + questions(data, "HQEdit"))
    features = TinyBackbone.load().question_features(encoded)
    chosen, cosines = learnt.method.pool.nearest(features)
    for query, numbers, values in zip(features.double(), chosen.tolist(), cosines.tolist(), strict=True):
        similar = [float(query @ key / query.norm() / key.norm()) for key in learnt.method.pool.keys.detach().double()]
        best = sorted(range(len(similar)), key=similar.__getitem__)[-learnt.method.top_k :]
        assert numbers == sorted(best)
        assert sorted(values) == pytest.approx([similar[number] for number in best], abs=1e-5)


def test_questions_are_of_the_frozen_model(learnt: Sequence) -> None:
    """To the bit: no prompt precedes the question when its features are computed."""
    encoded = learnt.tiny.encode(learnt.samples("HQEdit")[:6])
    seen, nearest = [], learnt.method.pool.nearest
    learnt.method.pool.nearest = lambda features: seen.append(features) or nearest(features)
    learnt.method.before_step(encoded)
    learnt.method.extra_loss(encoded)
    del learnt.method.pool.nearest
    assert torch.equal(seen[0], TinyBackbone.load().question_features(encoded))


def test_prompts_learn_from_the_task_and_keys_from_the_questions(data: Path) -> None:
    """The task loss reaches the prompts chosen and no key; the pull is in closed form and reaches the keys chosen."""
    sequence, trainer = opened("prompt-pool", data, "VQAv2", pull=0.3)
    pool, batch = sequence.method.pool, trainer.batches.encoded[:4]
    sequence.method.before_step(batch)
    chosen = pool.chosen
    sequence.tiny.loss(batch).total.backward()
    assert pool.keys.grad is None
    assert set(pool.prompts.grad.flatten(1).any(1).nonzero().flatten().tolist()) == set(chosen.flatten().tolist())
    before = pool.prompts.grad.clone()
    loss = sequence.method.extra_loss(batch)
    loss.backward()
    assert torch.equal(pool.prompts.grad, before)
    queries = sequence.tiny.question_features(batch).double()
    keys = pool.keys.detach().double().requires_grad_()
    expected = 0.3 / 4 * sum(1 - F.cosine_similarity(queries[i], keys[j], dim=0) for i in range(4) for j in chosen[i])
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pool.keys.grad.double(), keys.grad, rtol=1e-4, atol=1e-7)


def test_training_puts_each_sample_behind_its_own_prompts(data: Path) -> None:
    """A batch's outputs are those of its samples one by one, each with its own prompts."""
    sequence = Sequence("prompt-pool", data)
    sequence.learn("VQAv2")
    pool, batch = sequence.method.pool, sequence.tiny.encode(sequence.samples("VQAv2")[:6])
    chosen, _ = pool.nearest(sequence.tiny.question_features(batch))
    with torch.no_grad():
        with pool.before(chosen):
            together = sequence.tiny.output(batch).logits
        parts = []
        for row, item in zip(chosen, batch, strict=True):
            with pool.before(row[None]):
                parts.append(sequence.tiny.output([item]).logits)
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-4)
    assert len(set(map(tuple, chosen.tolist()))) > 1


def test_the_model_is_the_base_to_the_bit_between_steps(data: Path) -> None:
    sequence, trainer = opened("prompt-pool", data, "HQEdit")
    for _ in range(STEPS):
        trainer.train_step()
        found, base = (
            backbone.output(trainer.batches.encoded[:4]) for backbone in (sequence.tiny, TinyBackbone.load())
        )
        assert torch.equal(found.logits, base.logits)
        assert torch.equal(found.image_pred, base.image_pred)


def test_answers_do_not_depend_on_the_company(learnt: Sequence, data: Path) -> None:
    """Together, in groups of the same prompts, or one at a time: the same answers in the order of the questions."""
    shown = questions(data, "VQAv2", 5) + questions(data, "Flickr30k", 3)
    together = learnt.method.answer(shown, 8, None)
    alone = [learnt.method.answer([one], 8, None)[0] for one in shown]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.image is None for answer in together] == [answer.image is None for answer in alone]
    assert learnt.method.pool.chosen is None


def test_a_pool_too_small_for_top_k_is_refused(tiny: TinyBackbone) -> None:
    with pytest.raises(
        UserError, match=r"312,320 parameters are 2 prompts of 1000 vectors, fewer than the 3 to select"
    ):
        PromptPool(length=1000, top_k=3).setup(tiny, [], torch.Generator().manual_seed(0))
