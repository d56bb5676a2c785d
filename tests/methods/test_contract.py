"""One contract for all methods: what a method may change and store, and that a resumed run ends with the same bits.

By default on one method of each kind; on all of them with ``-m ''``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, VARIANTS, Sequence, questions, resume, same

from cnext import adapters, methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.tasks import suites

KINDS = {
    "lora": "one branch",
    "mage-experts": "branches by role, average, penalty, choice by the question",
    "mr-lora": "a branch per task, rehearsal, an additional phase",
    "lae": "evaluates other parameters than it trains",
    "pgp": "changes gradients and steps",
    "prompt-pool": "no low-rank branches",
    "mage with pema-kron": "reads gradients of frozen branches",
}
LORA = 312_320
"""Parameters of one branch of rank 32 in every target of the tiny backbone."""


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in sorted({*methods.modules(), *VARIANTS})
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_has_the_parameters_of_lora_of_rank_32(name: str, data: Path) -> None:
    """Within 1%; routers come on top, a few per layer, and a task may train fewer."""
    sequence = Sequence(name, data)
    counts = []
    for task in TASKS:
        parameters = sequence.method.trainable(suites.load("next-tiny").task(task))
        counts.append(sum(p.numel() for key, p in parameters.items() if ".router." not in key))
    assert max(counts) <= 1.01 * LORA
    total = sum(p.numel() for key, p in sequence.method.adapter_parameters().items() if ".router." not in key)
    assert name == "zero-shot" or total >= 0.99 * LORA


def old_samples_seen(sequence: Sequence) -> int:
    """Number of samples of a first task that a method encodes or puts through the model while it trains on a second."""
    tiny, encoded, passed = sequence.tiny, [], []
    plain = {name: getattr(tiny, name) for name in ("encode", "output", "question_features")}

    def encode(samples: list) -> list:
        encoded.extend((sample.image, sample.turns[0].instruction) for sample in samples)
        return plain["encode"](samples)

    def watched(name: str) -> Callable:
        def call(batch: list, *rest: object) -> object:
            passed.append(list(batch))
            return plain[name](batch, *rest)

        return call

    tiny.encode, tiny.output, tiny.question_features = encode, watched("output"), watched("question_features")
    sequence.learn(TASKS[0])
    assert not sequence.parameters or passed, "what goes through the model is seen here"
    first = {id(item): item for batch in passed for item in batch}
    encoded.clear()
    passed.clear()
    sequence.learn(TASKS[1])
    old = {(sample.image, sample.turns[0].instruction) for sample in sequence.samples(TASKS[0])}
    instructions = {instruction for _, instruction in old}
    named = {one for one in encoded if one in old or any(one[1].startswith(known) for known in instructions)}
    return max(len(named), len(first.keys() & {id(item) for batch in passed for item in batch}))


def test_sees_no_more_old_samples_than_its_card_says(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    seen = old_samples_seen(sequence)
    assert seen <= sequence.method.card.rehearsal
    assert sequence.method.card.rehearsal == 0 or seen, "a method that asks for samples uses them"


def test_the_sample_count_finds_samples_kept_in_secret(data: Path) -> None:
    sequence, kept = Sequence("lora", data), []
    sequence.method.before_step = lambda batch: kept.extend(batch if len(kept) < 4 else [])
    sequence.method.extra_loss = lambda batch: sequence.tiny.loss(kept[:4]).total
    assert old_samples_seen(sequence) == 4


def test_needs_no_task_identity_unless_its_card_says_so(name: str, data: Path) -> None:
    """Questions of two tasks in one call get the answers that they get apart; no name or task comes with them."""
    sequence = Sequence(name, data)
    sequence.learn(*TASKS[:2])
    method = sequence.method
    assert not method.card.task_id_at_test
    sequence.tiny.eval()
    groups = [questions(data, task, 3) for task in TASKS[:2]]
    with method.for_eval():
        apart = [answer.text for group in groups for answer in method.answer(group, 6, None)]
        together = method.answer([*groups[0], *groups[1]][::-1], 6, None)[::-1]
    assert [answer.text for answer in together] == apart


def test_keeps_no_more_bytes_than_it_says(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    sequence.learn(*TASKS)
    kept = [*sequence.method.state_dict().values(), *sequence.method.adapter_parameters().values()]
    extra = max(0, sum(t.numel() * t.element_size() for t in kept) - 4 * LORA * bool(sequence.parameters))
    bound = sequence.method.extra_bytes(len(TASKS))
    counters = 64
    assert extra <= bound + counters
    assert extra >= bound / 1.1 - counters


def test_changes_the_trained_parameters_and_nothing_else(name: str, data: Path) -> None:
    """With the adapters removed the model is the pretrained one."""
    sequence = Sequence(name, data)
    for task in TASKS:
        before = sequence.state()
        sequence.learn(task)
        changed = {key for key, value in sequence.state().items() if not torch.equal(before[key], value)}
        added = {f"method:{key}": parameter for key, parameter in sequence.method.adapter_parameters().items()}
        declared = {id(parameter) for parameter in sequence.parameters.values()}
        named = (dict(sequence.tiny.named_parameters()) | added).items()
        trained = {key for key, p in named if id(p) in declared or p.requires_grad}
        assert changed <= trained
        assert bool(changed) == bool(sequence.parameters), "a task that trains something changes it"
    adapters.detach(sequence.tiny.language_model)
    assert same(sequence.tiny.state_dict(), TinyBackbone.load().state_dict())


def test_starts_as_the_pretrained_model(name: str, data: Path) -> None:
    shown = questions(data, "VQAv2")
    expected = [answer.text for answer in TinyBackbone.load().generate(shown, 8)]
    sequence = Sequence(name, data)
    with sequence.method.for_eval():
        assert [answer.text for answer in sequence.method.answer(shown, 8, None)] == expected


STOPS = [None, 1, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 3))]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: "between" if stop is None else f"after-{stop}-steps")
def test_a_resumed_run_ends_with_the_same_bits(name: str, data: Path, stop: int | None) -> None:
    whole, resumed = Sequence(name, data), resume(name, data, stop)
    whole.learn(*TASKS)
    assert same(resumed.state(), whole.state())
    assert same(resumed.method.state_dict(), whole.method.state_dict())
