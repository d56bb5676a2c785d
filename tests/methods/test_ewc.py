"""EWC: the Fisher information and the penalty's gradient against plain loops."""

from __future__ import annotations

from pathlib import Path

import torch
from methods.sequence import STEPS, Sequence, squares_of

from cnext.methods.parts.penalties import QuadraticPenalty


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def test_the_penalty_and_its_gradient_are_the_analytic_ones() -> None:
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (4, 1)]
    fisher, anchor, theta = ([drawn(*shape) for shape in shapes] for _ in range(3))
    theta = [tensor.requires_grad_() for tensor in theta]
    value = QuadraticPenalty.apply(0.3, fisher, anchor, *theta)
    (3 * value).backward()
    moved = [t.detach() - a for t, a in zip(theta, anchor, strict=True)]
    expected = 0.3 * sum((f * d**2).sum() for f, d in zip(fisher, moved, strict=True))
    torch.testing.assert_close(value.detach(), expected)
    for f, d, t in zip(fisher, moved, theta, strict=True):
        torch.testing.assert_close(t.grad, 3 * 2 * 0.3 * f * d)
    assert torch.autograd.gradcheck(lambda *t: QuadraticPenalty.apply(0.3, fisher, anchor, *t), theta)


def test_fisher_anchor_and_pull_against_a_plain_loop(data: Path) -> None:
    """F_t: squares of the task's own gradient in the second half of the steps, with mean 1. F is the sum over tasks.

    At the end of a task the parameters are where the optimizer left them, and that is the next one's anchor.
    """
    sequence = Sequence("ewc", data, penalty=0.05)
    method = sequence.method
    fisher: dict[str, torch.Tensor] = {}
    for task in ("VQAv2", "HQEdit", "Flickr30k"):
        trainer = sequence.open(task)
        start = {name: p.detach().double() for name, p in sequence.parameters.items()}
        squares = dict.fromkeys(start, 0)
        while trainer.step < STEPS:
            with squares_of(sequence, trainer) as found:
                trainer.train_step()
            squares = {name: squares[name] + square for name, square in found.items()}
            method.extra_loss([]).backward()
            for name, parameter in sequence.parameters.items():
                pull = 2 * 0.05 * fisher.get(name, 0) * (parameter.detach().double() - start[name])
                expected = torch.zeros_like(start[name]) + pull
                torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-4, atol=1e-9)
                parameter.grad = None
        end = sequence.state()
        method.after_task()
        assert all(torch.equal(end[name], value) for name, value in sequence.state().items())
        mean = sum(s.sum() for s in squares.values()) / sum(s.numel() for s in squares.values())
        fisher = {name: fisher.get(name, 0) + square / mean for name, square in squares.items()}
    assert max(f.max() for f in fisher.values()) > 1


def test_a_strong_penalty_keeps_the_parameters_where_they_were(data: Path) -> None:
    moved = []
    for penalty in (0.0, 100.0):
        sequence = Sequence("ewc", data, penalty=penalty)
        sequence.learn("VQAv2")
        weight = {name: f.clone() for name, f in sequence.method.rule.fisher_old.items()}
        before = {name: p.detach().clone() for name, p in sequence.parameters.items()}
        sequence.learn("HQEdit")
        moved.append(sum((weight[n] * (p.detach() - before[n]) ** 2).sum() for n, p in sequence.parameters.items()))
    assert moved[1] < 0.9 * moved[0]
