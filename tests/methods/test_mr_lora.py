"""MR-LoRA: independent branches, and a router that sees the question only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence, opened, questions

from cnext import adapters
from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import UserError
from cnext.methods.mr_lora import MrLora, routing_sample
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample, Turn


@pytest.fixture(scope="module")
def learnt(data: Path) -> Sequence:
    """Two of three tasks, with a router that has trained enough to tell them apart."""
    sequence = Sequence("mr-lora", data, router_steps=12)
    sequence.learn(*TASKS[:2])
    sequence.tiny.eval()
    return sequence


@pytest.mark.parametrize("method", ["mr-lora", "prototype"])
def test_a_branch_is_what_it_would_be_had_no_task_come_before(method: str, data: Path) -> None:
    """To the bit: branches are independent, and none changes during another task."""
    both, alone = Sequence(method, data), Sequence(method, data)
    both.learn("VQAv2")
    first = {name: p.clone() for name, p in adapters.branch_parameters(both.tiny.language_model, ["task-1"]).items()}
    both.learn("Flickr30k")
    alone.learn("Flickr30k")
    seconds = [adapters.branch_parameters(s.tiny.language_model, ["task-2"]) for s in (both, alone)]
    assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in seconds), strict=True))
    assert any(p.any() for name, p in seconds[0].items() if name.endswith("B"))
    after = adapters.branch_parameters(both.tiny.language_model, ["task-1"])
    assert all(torch.equal(first[name], p) for name, p in after.items())


def test_a_task_starts_from_the_base_model(data: Path) -> None:
    sequence, trainer = opened("mr-lora", data, "VQAv2", "HQEdit")
    base = TinyBackbone.load().output(trainer.batches.encoded[:4])
    torch.testing.assert_close(
        sequence.tiny.output(trainer.batches.encoded[:4]).image_pred, base.image_pred, rtol=0, atol=0
    )


def test_the_router_learns_which_task_a_question_is_of(learnt: Sequence, data: Path) -> None:
    for number, task in enumerate(TASKS[:2], 1):
        routes = learnt.method.route(questions(data, task))
        assert routes.count(f"task-{number}") >= 7


def test_the_router_sees_the_question_only(learnt: Sequence, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other answers, later turns, names and target images change no route, and none of them is encoded."""
    plain = formats.read_samples(suites.load("next-tiny").task("HQEdit"), data, "test")[:4] + questions(
        data, "VQAv2", 4
    )
    dressed = [
        dataclasses.replace(
            sample,
            id="VQAv2-1",
            turns=(Turn(sample.turns[0].instruction, "b"), Turn("what color", "blue")),
            target_image=Path("nowhere.png"),
            origin="VQAv2.json:1",
        )
        for sample in plain
    ]
    seen, encode = [], TinyBackbone.encode

    def spy(backbone: TinyBackbone, samples: list[Sample]) -> list:
        seen.extend(samples)
        return encode(backbone, samples)

    monkeypatch.setattr(TinyBackbone, "encode", spy)
    assert learnt.method.route(plain) == learnt.method.route(dressed)
    assert all(sample.target_image is None and len(sample.turns) == 1 for sample in seen)
    assert {sample.turns[0].answer for sample in seen} <= {"a", "b"}
    assert {sample.id + sample.origin for sample in seen} == {""}


def test_what_the_router_is_trained_on(data: Path) -> None:
    """Each task's samples with its letter, in the order learnt, and again no answer and no target."""
    sequence, _ = opened("mr-lora", data, "HQEdit", "VQAv2", samples=3)
    kept = [
        routing_sample(s, number) for number, name in enumerate(("HQEdit", "VQAv2")) for s in sequence.samples(name)[:3]
    ]
    assert [sample.turns[0].answer for sample in kept] == ["a"] * 3 + ["b"] * 3
    assert all(sample.target_image is None and sample.id == "" for sample in kept)
    for item, other in zip(sequence.method.memory, sequence.tiny.encode(kept), strict=True):
        assert torch.equal(item.ids, other.ids)
        assert item.target is None


def test_only_tasks_seen_are_chosen(learnt: Sequence, data: Path) -> None:
    assert set(learnt.method.route([q for task in TASKS for q in questions(data, task)])) <= {"task-1", "task-2"}


def test_each_question_is_answered_with_its_own_branch(learnt: Sequence, data: Path) -> None:
    mixed = [q for pair in zip(questions(data, "VQAv2"), questions(data, "Flickr30k"), strict=True) for q in pair]
    answers = learnt.method.answer(mixed, 8, None)
    for branch in ("task-1", "task-2"):
        places = [place for place, chosen in enumerate(learnt.method.route(mixed)) if chosen == branch]
        assert places
        with adapters.activated(learnt.tiny.language_model, [branch]):
            expected = learnt.tiny.generate([mixed[place] for place in places], 8)
        assert [answers[place].text for place in places] == [answer.text for answer in expected]
        assert [answers[place].image is None for place in places] == [answer.image is None for answer in expected]


def test_the_oracle_is_given_the_task_and_keeps_no_sample(data: Path) -> None:
    sequence = Sequence("mr-lora", data, oracle=True)
    assert sequence.method.card.task_id_at_test
    assert sequence.method.card.rehearsal == 0
    router = adapters.branch_parameters(sequence.tiny.language_model, ["router"])
    sequence.learn(*TASKS[:2])
    assert not any(p.any() for name, p in router.items() if name.endswith("B"))
    shown = questions(data, "VQAv2")
    for number, task in enumerate(TASKS[:2], 1):
        found = sequence.method.answer(shown, 8, suites.load("next-tiny").task(task))
        with adapters.activated(sequence.tiny.language_model, [f"task-{number}"]):
            assert [a.text for a in found] == [a.text for a in sequence.tiny.generate(shown, 8)]


def test_more_tasks_than_letters_are_refused(tiny: TinyBackbone) -> None:
    task = suites.load("next-tiny").task("VQAv2")
    tasks = [dataclasses.replace(task, name=f"task {number}") for number in range(27)]
    with pytest.raises(UserError, match="at most 26 tasks, one per letter, got 27"):
        MrLora().setup(tiny, tasks, torch.Generator().manual_seed(0))
