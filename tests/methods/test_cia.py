"""CIA: the moving average of two tasks against a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import Sequence, train_rest


@pytest.mark.parametrize("factor", [2.0, 1e6], ids=["by-the-formula", "by-the-fallback"])
def test_two_tasks_against_a_plain_loop(data: Path, factor: float) -> None:
    """One alpha per tensor and step, mostly from the formula here; from the fallback at a huge factor."""
    sequence = Sequence("cia", data, factor=factor)
    method = sequence.method
    formula = total = 0
    for task in ("VQAv2", "HQEdit"):
        trainer = sequence.open(task)
        average = {name: p.detach().double() for name, p in sequence.parameters.items()}
        before: dict[str, torch.Tensor] = {}
        plain = method.transform_gradients

        def observed(parameters: dict, *, plain=plain, average=average, before=before) -> None:
            nonlocal formula, total
            for name, parameter in parameters.items():
                theta, gradient = parameter.detach().double(), parameter.grad.double()
                if name in before:
                    moved, turned = (theta - average[name]).abs().sum(), (gradient - before[name]).abs().sum()
                    alpha = factor * (1 + gradient.abs().sum()) / (moved * turned) if moved * turned else torch.inf
                    formula, total = formula + (0 < alpha < 1), total + 1
                    alpha = alpha if 0 < alpha < 1 else 0.01
                    average[name] = (1 - alpha) * average[name] + alpha * theta
                before[name] = gradient
            plain(parameters)

        method.transform_gradients = observed
        train_rest(trainer)
        last = {name: p.detach().double() for name, p in sequence.parameters.items()}
        del method.transform_gradients
        method.after_task()
        for name, parameter in sequence.parameters.items():
            expected = 0.99 * average[name] + 0.01 * last[name]
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-7)
    assert (formula > total / 2) == (factor < 10), f"the formula gave {formula} of {total}"


def test_nothing_but_counters_is_kept_between_tasks(data: Path) -> None:
    sequence = Sequence("cia", data)
    sequence.learn("VQAv2")
    state = sequence.method.state_dict()
    assert {name: tensor.ndim for name, tensor in state.items()} == {"step": 0, "steps": 0}
