"""MAGE-pull: the gradient of the penalty, and that the Fisher information does not contain it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import branches_of, opened, squares_of, train_rest

BOTH = ("VQAv2", "HQEdit")


def test_the_gradient_is_pull_times_fisher_times_distance(data: Path) -> None:
    sequence, _ = opened("mage-pull", data, *BOTH, pull=0.5)
    start = {key: p.detach().double() for key, p in sequence.parameters.items()}
    with torch.no_grad():
        for parameter in sequence.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    loss = sequence.method.extra_loss([])
    loss.backward()
    expected = 0.0
    for key, parameter in sequence.parameters.items():
        fisher = sequence.method.rule.fisher_old[key].double()
        moved = parameter.detach().double() - start[key]
        torch.testing.assert_close(parameter.grad.double(), 0.5 * fisher * moved, rtol=1e-4, atol=1e-7)
        expected += float((0.5 / 2 * fisher * moved**2).sum())
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    pulled = {key: p for key, p in sequence.parameters.items() if p.grad.abs().max() > 0}
    assert branches_of(pulled) == {"text-general", "image-general"}, "a branch new to training is free"


def test_the_fisher_information_is_of_the_task_loss_alone(data: Path) -> None:
    """F_t is summed from what ``.grad`` holds before the pull is added, also where the pull is strong."""
    sequence, trainer = opened("mage-pull", data, *BOTH, pull=100.0)
    with squares_of(sequence, trainer) as squares:
        train_rest(trainer)
    for key, total in squares.items():
        torch.testing.assert_close(sequence.method.rule.fisher_new[key], total.float())


def test_a_strong_pull_stays_nearer_where_old_tasks_need_it(data: Path) -> None:
    moved = []
    for pull in (0.0, 0.1):
        sequence, trainer = opened("mage-pull", data, *BOTH, pull=pull)
        start = {key: p.detach().clone() for key, p in sequence.parameters.items()}
        train_rest(trainer)
        fisher = sequence.method.rule.fisher_old
        terms = [fisher[key] * (p.detach() - start[key]) ** 2 for key, p in sequence.parameters.items()]
        moved.append(float(sum(term.sum() for term in terms)))
    assert moved[1] < 0.9 * moved[0]
