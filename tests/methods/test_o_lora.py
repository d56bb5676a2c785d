"""O-LoRA: the penalty against a plain loop, and which branches are trained and active."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence

from cnext import adapters
from cnext.adapters import AdapterLinear


def active(sequence: Sequence) -> set[tuple[str, ...]]:
    return {tuple(layer.active) for layer in adapters.layers(sequence.tiny.language_model).values()}


def test_the_penalty_against_a_plain_loop(data: Path) -> None:
    sequence = Sequence("o-lora", data, penalty=0.7)
    sequence.open(TASKS[0])
    assert sequence.method.extra_loss([]) is None
    sequence.learn(*TASKS[:2])
    sequence.open(TASKS[2])
    value = sequence.method.extra_loss([])
    value.backward()
    expected, gradients = 0.0, {}
    for name, layer in adapters.layers(sequence.tiny.language_model).items():
        a = layer.branches["task-3"].A.detach().double()
        gradients[f"{name}.task-3.A"] = torch.zeros_like(a)
        for number in (1, 2):
            old = layer.branches[f"task-{number}"].A.detach().double()
            expected += 0.7 * float((old @ a.T).norm() ** 2)
            gradients[f"{name}.task-3.A"] += 2 * 0.7 * (a @ old.T) @ old
    assert value.item() == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sequence.parameters[name].grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_the_penalty_turns_the_new_branch_away(data: Path) -> None:
    overlap = []
    for penalty in (0.0, 0.5):
        sequence = Sequence("o-lora", data, penalty=penalty)
        sequence.learn(*TASKS[:2])
        layers = adapters.layers(sequence.tiny.language_model).values()
        overlap.append(sum((x.branches["task-1"].A @ x.branches["task-2"].A.T).square().sum() for x in layers))
    assert overlap[1] < 0.9 * overlap[0]


def test_the_current_branch_is_trained_and_later_ones_are_off(data: Path) -> None:
    sequence = Sequence("o-lora", data)
    assert active(sequence) == {()}
    model = sequence.tiny.language_model
    for number, task in enumerate(TASKS, 1):
        before = {name: p.detach().clone() for name, p in adapters.branch_parameters(model).items()}
        sequence.learn(task)
        assert active(sequence) == {tuple(f"task-{k}" for k in range(1, number + 1))}
        assert sum(p.numel() for p in sequence.parameters.values()) == 312_320
        now = adapters.branch_parameters(model)
        assert all(torch.equal(before[name], now[name]) == (f".task-{number}." not in name) for name in before)


def test_the_branches_are_as_good_as_merged(data: Path) -> None:
    """Two frozen branches and a trained one equal the trained one on a weight that the two are merged into."""
    sequence = Sequence("o-lora", data, scale=1.0)
    sequence.learn(*TASKS)
    layer: AdapterLinear = next(iter(adapters.layers(sequence.tiny.language_model).values()))
    x = torch.randn(5, layer.base.in_features, generator=torch.Generator().manual_seed(0))
    one, two, live = (layer.branches[f"task-{k}"] for k in (1, 2, 3))
    weight = layer.base.weight.double() + one.B.double() @ one.A.double() + two.B.double() @ two.A.double()
    expected = x.double() @ weight.T + x.double() @ live.A.double().T @ live.B.double().T
    torch.testing.assert_close(layer(x).detach().double(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_evaluates_with_the_branches_learnt(data: Path) -> None:
    """Between tasks the number of active branches comes from the state."""
    first = Sequence("o-lora", data)
    first.learn(*TASKS[:2])
    second = Sequence("o-lora", data)
    second.restore(first)
    second.method.load_state_dict(first.method.state_dict())
    assert active(second) == active(first) == {("task-1", "task-2")}
