"""One contract over every method that is registered: what it may change, and that it can be stopped and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, TASKS, Sequence

from cnext import adapters, methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.tasks import formats, suites

NAMES = sorted(methods.modules())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_is_a_dataclass_with_documented_defaults(name: str) -> None:
    kind = methods.load(name)
    assert dataclasses.is_dataclass(kind)
    assert methods.summary(name), "the module's first line says what the method is"
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind) if field.init)


def test_changes_the_trained_parameters_and_nothing_else(name: str, data: Path) -> None:
    sequence = Sequence(name, data)
    for task in TASKS:
        before = sequence.state()
        sequence.learn(task)
        after = sequence.state()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        trained = {key for key, parameter in sequence.tiny.named_parameters() if parameter.requires_grad}
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


@pytest.mark.parametrize("stop", [0, 1, 3], ids=lambda step: f"after-{step}-steps")
def test_a_resumed_task_ends_as_one_never_interrupted(name: str, data: Path, stop: int) -> None:
    whole = Sequence(name, data)
    for task in TASKS:
        whole.learn(task)

    first = Sequence(name, data)
    first.learn(TASKS[0])
    first.learn(TASKS[1])
    trainer = first.open(TASKS[2])
    for _ in range(stop if trainer else 0):
        trainer.train_step()
    kept = {key: value.clone() for key, value in first.method.state_dict().items()}
    moments = {key: value.clone() for key, value in trainer.state_dict().items()} if trainer else {}

    second = Sequence(name, data)
    second.tiny.load_state_dict(first.state())
    again = second.open(TASKS[2])
    second.method.load_state_dict(kept)
    if again:
        again.load_state_dict(moments, stop)
        while again.step < STEPS:
            again.train_step()
        second.method.after_task()
    assert same(second.state(), whole.state())


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
