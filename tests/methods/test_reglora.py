"""RegLoRA: the entries protected and the penalty against dense matrices in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence

from cnext import adapters


def dense(sequence: Sequence, branch: str) -> dict[str, torch.Tensor]:
    layers = adapters.layers(sequence.tiny.language_model)
    return {name: (x.branches[branch].B @ x.branches[branch].A).detach() for name, x in layers.items()}


def test_exactly_the_largest_entries_of_every_task_are_protected(data: Path) -> None:
    sequence = Sequence("reglora", data)
    for count, task in enumerate(TASKS[:2], 1):
        sequence.learn(task)
        for name, update in dense(sequence, f"task-{count}").items():
            size = int(0.02 * update.numel())
            protected = sequence.method.protected[name]
            assert protected.dtype == torch.int32
            assert len(protected) == count * size
            chosen = torch.zeros(update.numel(), dtype=torch.bool)
            chosen[protected[-size:].long()] = True
            assert chosen.sum() == size
            assert update.flatten().abs()[chosen].min() >= update.flatten().abs()[~chosen].max()


def test_the_smallest_share_is_one_entry(data: Path) -> None:
    """The mean over no entries would be NaN."""
    sequence = Sequence("reglora", data, share=1e-9)
    sequence.learn(TASKS[0])
    assert {len(indices) for indices in sequence.method.protected.values()} == {1}
    sequence.learn(TASKS[1])
    assert all(torch.isfinite(parameter).all() for parameter in sequence.parameters.values())


def test_the_penalty_against_dense_matrices(data: Path) -> None:
    """Entries protected by two tasks count twice in the mean, as in the release."""
    sequence = Sequence("reglora", data, penalty=3.0, share=0.5)
    sequence.learn(*TASKS[:2])
    sequence.open(TASKS[2]).train_step()
    value = sequence.method.extra_loss([])
    value.backward()
    layers = adapters.layers(sequence.tiny.language_model)
    expected = 0.0
    for name, layer in layers.items():
        a, b = (tensor.detach().double() for tensor in (layer.branches["task-3"].A, layer.branches["task-3"].B))
        indices = sequence.method.protected[name].long()
        count = torch.bincount(indices, minlength=b.shape[0] * a.shape[1]).double().view(b.shape[0], a.shape[1])
        assert count.max() == 2
        weight = 3.0 * count / len(indices) / len(layers)
        update = b @ a
        expected += float((weight * update.abs()).sum())
        pull = weight * update.sign()
        for part, gradient in (("A", b.T @ pull), ("B", pull @ a.T)):
            found = sequence.parameters[f"{name}.task-3.{part}"].grad
            torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-7)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_the_first_task_has_no_penalty_and_no_later_change(data: Path) -> None:
    sequence = Sequence("reglora", data)
    sequence.open(TASKS[0])
    assert sequence.method.extra_loss([]) is None
    sequence.learn(TASKS[0])
    before = dense(sequence, "task-1")
    sequence.learn(TASKS[1])
    assert all(torch.equal(update, before[name]) for name, update in dense(sequence, "task-1").items())


def test_the_penalty_keeps_protected_entries_small(data: Path) -> None:
    sizes = []
    for penalty in (0.0, 1e4):
        sequence = Sequence("reglora", data, penalty=penalty)
        sequence.learn(TASKS[0])
        protected = {name: indices.long() for name, indices in sequence.method.protected.items()}
        sequence.learn(TASKS[1])
        updates = dense(sequence, "task-2")
        sizes.append(sum(updates[name].flatten()[indices].abs().mean() for name, indices in protected.items()))
    assert sizes[1] < 0.9 * sizes[0]
