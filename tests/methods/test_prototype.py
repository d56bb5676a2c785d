"""Prototype: the nearest centroid against densities, what is kept, and which branch answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence, opened, questions

from cnext import adapters
from cnext.adapters.by_question import ByCentroid
from cnext.backbones.tiny.model import TinyBackbone
from cnext.tasks.base import Turn


@pytest.fixture(scope="module")
def learnt(data: Path) -> Sequence:
    """Two of three tasks."""
    sequence = Sequence("prototype", data)
    sequence.learn(*TASKS[:2])
    sequence.tiny.eval()
    return sequence


def test_nearest_is_that_of_gaussians_with_one_diagonal_covariance() -> None:
    """Against their log densities with the moments of all features at once; classes in any order, in any batches."""
    torch.manual_seed(0)
    spread = torch.rand(6, dtype=torch.float64) * 5 + 0.1
    groups = {k: torch.randn(90, 6, dtype=torch.float64) * spread + 2 * torch.randn(6) for k in (2, 0, 3)}
    by_centroid = ByCentroid(5, torch.empty(0, 6), 90)
    for task, x in groups.items():
        assert by_centroid.wants(task)
        for part in x.split(40):
            by_centroid.add(task, part)
        assert not by_centroid.wants(task)
    variances = torch.cat([x - x.mean(0) for x in groups.values()]).square().mean(0)
    variances += 1e-3 * variances.mean()
    asked = torch.cat(list(groups.values()))
    densities = torch.full((len(asked), 5), -torch.inf, dtype=torch.float64)
    for task, x in groups.items():
        densities[:, task] = torch.distributions.Normal(x.mean(0), variances.sqrt()).log_prob(asked).sum(1)
    found = by_centroid.nearest(asked)
    assert torch.equal(found, densities.argmax(1))
    assert set(found.tolist()) == {0, 2, 3}
    plain = torch.stack([(asked - x.mean(0)).square().sum(1) for x in groups.values()], 1).argmin(1)
    assert not torch.equal(torch.tensor([2, 0, 3])[plain], found), "the deviation within tasks is the unit"


def test_one_sample_of_each_task_is_enough() -> None:
    by_centroid = ByCentroid(2, torch.empty(0, 3), 10)
    by_centroid.add(0, torch.tensor([[1.0, 0, 0]]))
    by_centroid.add(1, torch.tensor([[0, 1.0, 0]]))
    assert by_centroid.nearest(torch.tensor([[0.1, 0.9, 5], [0.9, 0.1, -5]])).tolist() == [1, 0]
    assert ByCentroid(3, torch.empty(0, 4), 10).nearest(torch.ones(2, 4)).tolist() == [0, 0], "before the first"


def test_features_are_those_of_the_pretrained_model(data: Path) -> None:
    """In training as at test time: trained branches have no influence."""
    sequence, trainer = opened("prototype", data, "VQAv2", "Flickr30k")
    before = {name: tensor.clone() for name, tensor in sequence.method.by_centroid.state().items()}
    sequence.method.before_step(trainer.batches.encoded[:5])
    tiny = TinyBackbone.load()
    x = tiny.question_means(tiny.encode(sequence.samples("Flickr30k")[:5])).double()
    after = sequence.method.by_centroid.state()
    assert (after["counts"] - before["counts"]).flatten().tolist() == [0, 5, 0]
    torch.testing.assert_close(after["sums"] - before["sums"], torch.stack([0 * x[0], x.sum(0), 0 * x[0]]))
    torch.testing.assert_close(after["squares"] - before["squares"], x.square().sum(0))


def test_no_sample_is_kept(learnt: Sequence) -> None:
    assert learnt.method.card.rehearsal == 0
    assert {name: tuple(tensor.shape) for name, tensor in learnt.method.state_dict().items()} == {
        "active": (), "counts": (3, 1), "sums": (3, 128), "squares": (128,)
    }  # fmt: skip


def test_questions_find_their_tasks_and_only_tasks_learnt(learnt: Sequence, data: Path) -> None:
    for number, task in enumerate(TASKS[:2], 1):
        assert learnt.method.route(questions(data, task)).count(f"task-{number}") >= 7
    assert set(learnt.method.route(questions(data, TASKS[2]))) <= {"task-1", "task-2"}


def test_the_router_sees_the_question_only(learnt: Sequence, data: Path) -> None:
    plain = questions(data, "VQAv2", 4)
    dressed = [
        dataclasses.replace(
            sample, turns=(dataclasses.replace(sample.turns[0], answer="b"), Turn("more", "c")), id="Flickr30k-1"
        )
        for sample in plain
    ]
    assert learnt.method.route(plain) == learnt.method.route(dressed)


def test_each_question_is_answered_with_its_own_branch(learnt: Sequence, data: Path) -> None:
    mixed = [q for pair in zip(questions(data, "VQAv2"), questions(data, "Flickr30k"), strict=True) for q in pair]
    answers = learnt.method.answer(mixed, 8, None)
    for branch in ("task-1", "task-2"):
        places = [place for place, chosen in enumerate(learnt.method.route(mixed)) if chosen == branch]
        assert places
        with adapters.activated(learnt.tiny.language_model, [branch]):
            expected = learnt.tiny.generate([mixed[place] for place in places], 8)
        assert [answers[place].text for place in places] == [answer.text for answer in expected]
