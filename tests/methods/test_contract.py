"""One contract over every method that is registered: what it may change, and that it can be stopped and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, TASKS, Sequence
from safetensors.torch import load, save

from cnext import adapters, methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.tasks import formats, suites
from cnext.training.evaluation import question

NAMES = sorted(methods.modules())
LORA = 312_320
"""Parameters of one branch of rank 32 in every target of the tiny backbone."""


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_is_a_dataclass_whose_hyperparameters_say_what_they_mean(name: str) -> None:
    kind = methods.load(name)
    assert dataclasses.is_dataclass(kind)
    assert methods.summary(name), "the module's first line says what the method is"
    fields = [field for field in dataclasses.fields(kind) if field.init]
    assert all(field.default is not dataclasses.MISSING for field in fields)
    assert all(methods.described_fields(kind).values())


def test_the_card_is_filled_in(name: str) -> None:
    card = methods.load(name)().card
    assert card.paper
    assert card.keeps
    assert card.rehearsal >= 0
    shown = methods.describe(name, "1,234 at most")
    assert "extra bytes         1,234 at most" in shown
    assert card.paper in shown
    assert all(
        f".{field.replace('_', '-')} (default" in shown for field in methods.described_fields(methods.load(name))
    )


def test_trains_as_many_parameters_as_lora_of_rank_32(name: str, data: Path) -> None:
    """Within 1%; routers come on top, a few per layer, and a method may train fewer on a task that leaves some idle."""
    sequence = Sequence(name, data)
    counts = []
    for task in TASKS:
        parameters = sequence.method.trainable(suites.load("next-tiny").task(task))
        counts.append(sum(p.numel() for key, p in parameters.items() if ".router." not in key))
    assert max(counts) <= 1.01 * LORA
    total = sum(p.numel() for key, p in sequence.method.held().items() if ".router." not in key)
    assert name == "zero-shot" or total >= 0.99 * LORA


def old_samples_seen(sequence: Sequence) -> int:
    """How many samples of a first task a method encodes, or puts through the model, while it learns a second."""
    tiny, told, passed = sequence.tiny, [], []
    plain = {name: getattr(tiny, name) for name in ("encode", "output", "question_features")}

    def encode(samples: list) -> list:
        told.extend((sample.image, sample.turns[0].instruction) for sample in samples)
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
    told.clear()
    passed.clear()
    sequence.learn(TASKS[1])
    old = {(sample.image, sample.turns[0].instruction) for sample in sequence.samples(TASKS[0])}
    instructions = {instruction for _, instruction in old}
    named = {one for one in told if one in old or any(one[1].startswith(known) for known in instructions)}
    return max(len(named), len(first.keys() & {id(item) for batch in passed for item in batch}))


def test_sees_no_more_old_samples_than_its_card_says(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    seen = old_samples_seen(sequence)
    assert seen <= sequence.method.card.rehearsal
    assert sequence.method.card.rehearsal == 0 or seen, "a method that asks for samples uses them"


def test_a_method_that_keeps_encoded_samples_behind_its_cards_back_is_found(data: Path) -> None:
    sequence, kept = Sequence("lora", data), []
    sequence.method.before_step = lambda batch: kept.extend(batch if len(kept) < 4 else [])
    sequence.method.extra_loss = lambda batch: sequence.tiny.loss(kept[:4]).total
    assert old_samples_seen(sequence) == 4


def test_needs_no_task_identity_unless_its_card_says_so(name: str, data: Path) -> None:
    """Questions of two tasks in one call get the answers that they get apart; no name or task comes with them."""
    sequence = Sequence(name, data)
    for task in TASKS[:2]:
        sequence.learn(task)
    method = sequence.method
    assert not method.card.task_id_at_test
    apart, mixed = [], []
    sequence.tiny.eval()
    for task in TASKS[:2]:
        questions = [question(s) for s in formats.read(suites.load("next-tiny").task(task), data, "test")[:3]]
        with method.for_eval():
            apart += [answer.text for answer in method.answer(questions, 6, None)]
        mixed += questions
    with method.for_eval():
        together = method.answer(mixed[::-1], 6, None)[::-1]
    assert [answer.text for answer in together] == apart


def test_keeps_no_more_bytes_than_it_says(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    for task in TASKS:
        sequence.learn(task)
    kept = [*sequence.method.state_dict().values(), *sequence.method.held().values()]
    extra = max(0, sum(t.numel() * t.element_size() for t in kept) - 4 * LORA * bool(sequence.parameters))
    bound = sequence.method.extra_bytes(len(TASKS))
    counters = 64
    assert extra <= bound + counters
    assert extra >= bound / 1.1 - counters


def test_changes_the_trained_parameters_and_nothing_else(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    for task in TASKS:
        before = sequence.state()
        sequence.learn(task)
        after = sequence.state()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        held = {f"held:{key}": parameter for key, parameter in sequence.method.held().items()}
        declared = {id(parameter) for parameter in sequence.parameters.values()}
        trained = {
            key
            for key, p in (dict(sequence.tiny.named_parameters()) | held).items()
            if id(p) in declared or p.requires_grad
        }
        assert changed <= trained
        assert bool(changed) == bool(sequence.parameters), "a task that trains something changes it"


def test_the_base_model_is_untouched_with_the_adapters_off(name: str, data: Path) -> None:
    original = TinyBackbone.load().state_dict()
    sequence = Sequence(name, data)
    for task in TASKS:
        sequence.learn(task)
    adapters.detach(sequence.tiny.language_model)
    assert same(sequence.tiny.state_dict(), original)


def test_starts_as_the_pretrained_model(name: str, data: Path) -> None:
    samples = formats.read(suites.load("next-tiny").task("VQAv2"), data, "test")
    expected = [answer.text for answer in TinyBackbone.load().generate(samples, 8)]
    assert [answer.text for answer in Sequence(name, data).tiny.generate(samples, 8)] == expected


ANYWHERE = [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "stop", [None, *ANYWHERE], ids=lambda step: "between" if step is None else f"after-{step}-steps"
)
def test_a_resumed_run_ends_as_one_never_interrupted(name: str, data: Path, stop: int | None) -> None:
    whole = Sequence(name, data)
    for task in TASKS:
        whole.learn(task)

    first = Sequence(name, data)
    first.learn(TASKS[0])
    first.learn(TASKS[1])
    trainer = None if stop is None else first.open(TASKS[2])
    for _ in range(stop or 0):
        if trainer:
            trainer.train_step()
    kept = load(save(first.method.state_dict()))
    moments = load(save(trainer.state_dict())) if trainer else {}

    second = Sequence(name, data)
    second.restore(first)
    if stop is None:
        second.method.load_state_dict(kept)
    again = second.open(TASKS[2])
    if stop is not None:
        second.method.load_state_dict(kept)
    if again:
        again.load_state_dict(moments, stop or 0)
        while again.step < STEPS:
            again.train_step()
        second.method.after_task()
    assert same(second.state(), whole.state())
    assert same(second.method.state_dict(), whole.method.state_dict())


def test_training_is_repeatable(name: str, data: Path) -> None:
    states = []
    for _ in range(2):
        sequence = Sequence(name, data)
        sequence.learn("VQAv2")
        states.append(sequence.state())
    assert same(*states)


def test_unknown_methods_list_the_valid() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'mag'; valid: .*mage"):
        methods.load("mag")
