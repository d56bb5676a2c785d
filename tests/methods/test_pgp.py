"""PGP: the basis against its definition, and that no step of A has a component in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import RECIPE, STEPS, TASKS, Sequence, opened

from cnext import adapters
from cnext.adapters.subspace import extended


def covariance(width: int, rank: int) -> torch.Tensor:
    x = torch.randn(200, rank) @ torch.randn(rank, width) * torch.linspace(0.1, 3, width)
    return x.T @ x


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("old", [0, 5])
def test_the_fewest_directions_that_explain_the_share(share: float, old: int) -> None:
    torch.manual_seed(0)
    width = 24
    before = torch.linalg.qr(torch.randn(width, old))[0] if old else torch.empty(width, 0)
    r = covariance(width, width)
    basis = extended(before, r, share)
    assert torch.equal(basis[:, :old], before)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)
    explained = [float((u.T @ r @ u).trace() / r.trace()) for u in (basis, basis[:, :-1])]
    assert explained[0] >= share - 1e-6
    assert basis.shape[1] == old or explained[1] < share
    complement = torch.eye(width) - before @ before.T
    values = torch.linalg.eigvalsh((complement @ r @ complement).double()).flip(0)
    best = sum(values[: basis.shape[1] - old]) / r.double().trace()
    found = (basis.T @ r @ basis).trace() - (before.T @ r @ before).trace()
    assert float(found / r.trace()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 20)], ids=["nothing", "everything"])
def test_the_extremes(share: float, expected: int) -> None:
    torch.manual_seed(0)
    r = covariance(20, 20)
    basis = extended(torch.empty(20, 0), r, share)
    assert basis.shape[1] == expected
    assert extended(basis, r, share).shape[1] == expected


def test_no_step_of_a_has_a_part_in_the_basis(data: Path) -> None:
    """Over two whole tasks, with Adam's rescaling and weight decay."""
    assert RECIPE.weight_decay > 0
    sequence = Sequence("pgp", data)
    sequence.learn(TASKS[0])
    for task in TASKS[1:]:
        before = {name: a.detach().clone() for name, a in sequence.method.downs.items()}
        basis = dict(sequence.method.inputs.basis)
        sequence.learn(task)
        for name, a in sequence.method.downs.items():
            moved = (a - before[name]).detach()
            assert basis[name].shape[1] > 0
            assert (moved @ basis[name]).abs().max() < 1e-5
            assert moved.norm() > 1e-2


def test_the_gradient_is_projected_before_the_optimizer_sees_it(data: Path) -> None:
    sequence, trainer = opened("pgp", data, TASKS[0], TASKS[1])
    name, basis = next(iter(sequence.method.inputs.basis.items()))
    key, found = f"{name}.lora.A", []
    plain = sequence.method.transform_gradients

    def observed(parameters: dict) -> None:
        found.append(parameters[key].grad.double())
        plain(parameters)
        found.append(parameters[key].grad.double())

    sequence.method.transform_gradients = observed
    trainer.train_step()
    u = basis.double()
    assert (found[0] @ u).abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0] - found[0] @ u @ u.T, rtol=1e-4, atol=1e-6)


def test_the_inputs_are_those_of_the_last_steps_alone(data: Path) -> None:
    sequence, trainer = opened("pgp", data, TASKS[0], batches=2)
    name, layer = next(iter(sequence.method.inputs.layers.items()))
    expected = torch.zeros(layer.base.in_features, layer.base.in_features, dtype=torch.float64)
    for step in range(STEPS):
        seen = []
        handle = layer.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].detach()))
        trainer.train_step()
        handle.remove()
        x = seen[0].flatten(0, 1).double()
        expected += x.T @ x if step >= STEPS - 2 else 0
    torch.testing.assert_close(sequence.method.inputs.covariance[name].double(), expected, rtol=1e-4, atol=1e-3)


def test_nothing_watches_outside_training(data: Path) -> None:
    sequence, trainer = opened("pgp", data, TASKS[0])
    trainer.train_step()
    seen = {name: r.clone() for name, r in sequence.method.inputs.covariance.items()}
    sequence.tiny.generate(sequence.samples(TASKS[0])[:2], 2)
    assert seen
    assert all(torch.equal(sequence.method.inputs.covariance[name], r) for name, r in seen.items())
    assert all(x.observer is None for x in adapters.layers(sequence.tiny.language_model).values())
