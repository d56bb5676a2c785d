"""KeepLoRA: the gradient of the frozen weight, the directions taken from it, and that protected inputs stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import TASKS, Sequence, opened, train_rest

from cnext import adapters
from cnext.adapters.subspace import extended
from cnext.methods.keep_lora import residual_directions

LAYERS = ("layers.0.self_attn.q_proj", "layers.2.mlp.gate_proj", "layers.3.mlp.down_proj")


def basis(width: int, rank: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, rank))[0]


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("protected", [0, 7])
def test_no_other_rows_keep_more_of_the_residual_gradient(rank: int, protected: int) -> None:
    """A is orthonormal, orthogonal to M, and || G' A^T ||^2 is the sum of G's largest squared singular values there."""
    torch.manual_seed(0)
    g, m = torch.randn(16, 24), basis(24, protected) if protected else torch.empty(24, 0)
    a = residual_directions(g, m, rank)
    torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)
    assert protected == 0 or (a @ m).abs().max() < 1e-6
    rest = g @ (torch.eye(24) - m @ m.T)
    best = torch.linalg.svdvals(rest)[:rank].square().sum()
    torch.testing.assert_close((rest @ a.T).square().sum(), best, rtol=1e-4, atol=1e-4)


def test_directions_without_gradient_stay_empty() -> None:
    """Whether the gradient has too few, the layer is too narrow, or all that it has is protected."""
    torch.manual_seed(0)
    g = torch.outer(torch.randn(6), torch.randn(8))
    a = residual_directions(g, torch.empty(8, 0), 4)
    assert a.norm(dim=1).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-6)
    assert torch.equal(residual_directions(torch.randn(2, 8), torch.empty(8, 0), 4)[2:], torch.zeros(2, 8))
    row = g[:1].T / g[0].norm()
    assert torch.equal(residual_directions(g, row, 4), torch.zeros(4, 8))


def test_a_is_taken_from_the_gradient_of_the_frozen_weight(data: Path) -> None:
    """Which autograd gives for a weight that is trained, in a model without adapters, on the same batch."""
    sequence, trainer = opened("keep-lora", data, TASKS[0])
    batch = trainer.batches.at(0, 1)
    plain = Sequence("zero-shot", data).tiny
    weights = {name: plain.language_model.get_parameter(f"{name}.weight").requires_grad_() for name in LAYERS}
    expected = torch.autograd.grad(plain.loss(batch).total, list(weights.values()))
    found = {}
    taken = sequence.method.transform_gradients

    def spy(parameters: dict) -> None:
        found.update({name: gradient.clone() for name, gradient in sequence.method.found.items()})
        taken(parameters)

    sequence.method.transform_gradients = spy
    trainer.train_step()
    for name, gradient in zip(LAYERS, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)
        w = weights[name].detach()
        m = extended(torch.empty(w.shape[1], 0), w.T @ w, sequence.method.principal)
        share = (w @ m).square().sum() / w.square().sum()
        assert share >= sequence.method.principal - 1e-4
        torch.testing.assert_close(
            sequence.method.downs[name].detach(), residual_directions(gradient, m, 32), rtol=0, atol=1e-2
        )


def test_nothing_but_a_is_set_while_the_gradient_is_estimated(data: Path) -> None:
    """Then A is fixed, and B is trained."""
    sequence, trainer = opened("keep-lora", data, TASKS[0])
    layers = adapters.layers(sequence.tiny.language_model)
    trainer.train_step()
    assert not any(layer.branches["task-1"].B.any() for layer in layers.values())
    assert not any(layer._forward_hooks for layer in layers.values())
    fixed = {name: layer.branches["task-1"].A.clone() for name, layer in layers.items()}
    train_rest(trainer)
    assert all(torch.equal(layer.branches["task-1"].A, fixed[name]) for name, layer in layers.items())
    assert all(layer.branches["task-1"].B.abs().max() > 1e-4 for layer in layers.values())
    assert trainer.optimizer.state.keys() == {layer.branches["task-1"].B for layer in layers.values()}


def test_the_estimate_takes_at_most_an_eighth_of_the_steps(data: Path) -> None:
    sequence, _ = opened("keep-lora", data, TASKS[0], estimate=4)
    for steps, window in ((4, 1), (16, 2), (24, 3), (400, 4)):
        sequence.method.before_task(sequence.parameters, steps, {})
        assert sequence.method.window == window


def test_protected_inputs_give_what_they_gave(data: Path) -> None:
    """Those of the weights and of earlier tasks: no branch of a later task answers to them."""
    sequence = Sequence("keep-lora", data)
    sequence.learn(TASKS[0])
    start = {name: m.clone() for name, m in sequence.method.inputs.basis.items()}
    sequence.learn(*TASKS[1:])
    for name, layer in adapters.layers(sequence.tiny.language_model).items():
        m, wider = start[name], sequence.method.inputs.basis[name]
        assert torch.equal(wider[:, : m.shape[1]], m)
        w = layer.base.weight
        principal = extended(torch.empty(w.shape[1], 0), w.T @ w, sequence.method.principal)
        assert torch.equal(m[:, : principal.shape[1]], principal)
        for task, protected in (("task-1", principal), ("task-2", m), ("task-3", m)):
            branch = layer.branches[task]
            assert (branch.B @ (branch.A @ protected)).abs().max() < 1e-5
            assert (branch.B @ branch.A).abs().max() > 1e-4


def test_more_gradient_is_the_sum_over_steps(data: Path) -> None:
    sequence, trainer = opened("keep-lora", data, TASKS[0])
    sequence.method.window = 2
    parts = []
    taken = sequence.method.transform_gradients

    def spy(parameters: dict) -> None:
        parts.append(sequence.method.found[LAYERS[0]].clone())
        taken(parameters)

    sequence.method.transform_gradients = spy
    trainer.train_step()
    torch.testing.assert_close(sequence.method.state_dict()[f"gradient.{LAYERS[0]}"], parts[0])
    trainer.train_step()
    a, m = sequence.method.downs[LAYERS[0]].detach(), sequence.method.inputs.basis[LAYERS[0]]
    torch.testing.assert_close(a, residual_directions(parts[0] + parts[1], m, 32), rtol=0, atol=1e-4)
    assert not [name for name in sequence.method.state_dict() if name.startswith("gradient.")]


def test_the_estimate_goes_on_where_it_was_interrupted(data: Path) -> None:
    sequence, trainer = opened("keep-lora", data, TASKS[0])
    sequence.method.window = 2
    trainer.train_step()
    kept = {name: tensor.clone() for name, tensor in sequence.method.state_dict().items()}
    again, resumed = opened("keep-lora", data, TASKS[0])
    again.method.load_state_dict(kept)
    again.method.window = 2
    resumed.load_state_dict(trainer.state_dict(), 1)
    for one in (trainer, resumed):
        one.train_step()
    for name, down in sequence.method.downs.items():
        assert torch.equal(down, again.method.downs[name])
