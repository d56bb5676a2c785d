"""MAGE-experts: the discriminant against Gaussian densities, and which expert is trained and used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence, opened

from cnext import adapters
from cnext.adapters.by_question import ByQuestion
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.mage_experts import MageExperts
from cnext.tasks import suites
from cnext.tasks.base import Sample
from cnext.training.evaluation import question


def pretrained(samples: list[Sample]) -> torch.Tensor:
    """The samples' question features, of a model without adapters."""
    tiny = TinyBackbone.load()
    return tiny.question_features(tiny.encode(samples))


def test_likeliest_is_that_of_gaussians_with_one_covariance() -> None:
    """Against their log densities with the moments of all features at once; classes in any order, in any batches."""
    torch.manual_seed(0)
    mixing = torch.randn(6, 6, dtype=torch.float64)
    groups = {task: torch.randn(90, 6, dtype=torch.float64) @ mixing + 2 * torch.randn(6) for task in (2, 0, 3)}
    by_question = ByQuestion(5, torch.empty(0, 6), 90)
    for task, x in groups.items():
        assert by_question.wants(task)
        for part in x.split(40):
            by_question.add(task, part)
        assert not by_question.wants(task)
    centered = torch.cat([x - x.mean(0) for x in groups.values()])
    covariance = centered.T @ centered / len(centered)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(6)
    asked = torch.cat(list(groups.values()))
    densities = torch.full((len(asked), 5), -torch.inf, dtype=torch.float64)
    for task, x in groups.items():
        normal = torch.distributions.MultivariateNormal(x.mean(0), covariance)
        densities[:, task] = normal.log_prob(asked)
    found = by_question.likeliest(asked)
    assert torch.equal(found, densities.argmax(1))
    assert set(found.tolist()) == {0, 2, 3}


def test_before_the_first_task_any_expert_will_do() -> None:
    assert ByQuestion(3, torch.empty(0, 4), 10).likeliest(torch.ones(2, 4)).tolist() == [0, 0]


def test_features_are_those_of_the_pretrained_model(data: Path) -> None:
    """In training as at test time: trained adapters have no influence."""
    sequence, trainer = opened("mage-experts", data, "VQAv2", "Flickr30k")
    before = {name: tensor.clone() for name, tensor in sequence.method.by_question.state().items()}
    sequence.method.before_step(trainer.batches.encoded[:5])
    x = pretrained(sequence.samples("Flickr30k")[:5]).double()
    after = sequence.method.by_question.state()
    assert (after["counts"] - before["counts"]).flatten().tolist() == [0, 5, 0]
    torch.testing.assert_close(after["sums"] - before["sums"], torch.stack([0 * x[0], x.sum(0), 0 * x[0]]))
    torch.testing.assert_close(after["moments"] - before["moments"], x.T @ x)


def test_questions_find_their_tasks(data: Path) -> None:
    """All questions of the small suite, seen or not, are assigned to their task."""
    sequence = Sequence("mage-experts", data)
    for task in TASKS:
        trainer = sequence.open(task)
        sequence.method.before_step(trainer.batches.encoded)
        sequence.method.rule.abort_task()
    for number, task in enumerate(TASKS):
        x = pretrained([question(sample) for sample in sequence.samples(task)])
        assert sequence.method.by_question.likeliest(x).tolist() == [number] * len(x)


def test_an_expert_is_trained_by_its_task_alone(data: Path) -> None:
    sequence = Sequence("mage-experts", data)
    trained = {
        "VQAv2": {"text-general", "image-general", "expert-1"},
        "Flickr30k": {"text-general", "expert-2"},
        "HQEdit": {"text-general", "image-general", "expert-3"},
    }
    for task, expected in trained.items():
        before = sequence.state()
        sequence.learn(task)
        changed = {key.split(".")[-2] for key, value in sequence.state().items() if not torch.equal(value, before[key])}
        assert changed == expected
        branches = adapters.layers(sequence.tiny.language_model)["layers.0.mlp.up_proj"].active
        assert set(branches) == {"text-general", "image-general"} | {name for name in expected if "expert" in name}


def test_an_answer_uses_the_likeliest_expert_and_no_other(data: Path) -> None:
    sequence = Sequence("mage-experts", data)
    sequence.learn(*TASKS)
    sequence.tiny.eval()
    questions = [question(sample) for sample in sequence.samples("VQAv2")[:6]]
    before = [answer.text for answer in sequence.method.answer(questions, 6, None)]
    with torch.no_grad():
        for parameter in adapters.branch_parameters(sequence.tiny.language_model, ["expert-2", "expert-3"]).values():
            parameter.add_(1.0)
    assert [answer.text for answer in sequence.method.answer(questions, 6, None)] == before
    with torch.no_grad():
        for parameter in adapters.branch_parameters(sequence.tiny.language_model, ["expert-1"]).values():
            parameter.add_(1.0)
    assert [answer.text for answer in sequence.method.answer(questions, 6, None)] != before


@pytest.mark.parametrize("tasks", [3, 5, 6])
def test_the_rank_is_shared_evenly(tasks: int, tiny: TinyBackbone) -> None:
    suite = suites.load("next-tiny")
    method = MageExperts()
    method.setup(tiny, [suite.task(name) for name in suite.orders["paper"][:tasks]], torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in method.adapter_parameters().values()) == 312_320
    branches = adapters.layers(tiny.language_model)["layers.0.mlp.up_proj"].branches.values()
    ranks = [len(branch.A) for branch in branches]
    assert len(ranks) == tasks + 2
    assert max(ranks) - min(ranks) <= 1
