"""LAE: the offline copy against a plain loop, and the adapter that answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, TASKS, Sequence

DECAY = 0.8


def now(sequence: Sequence) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in sequence.parameters.items()}


def shown(sequence: Sequence) -> dict[str, torch.Tensor]:
    with sequence.method.for_eval():
        return now(sequence)


def test_the_offline_copy_against_a_plain_loop(data: Path) -> None:
    """It starts at the end of the first task and is not reset at the third."""
    sequence = Sequence("lae", data, decay=DECAY)
    sequence.learn(TASKS[0])
    offline = {name: value.double() for name, value in now(sequence).items()}
    for task in TASKS[1:]:
        trainer = sequence.open(task)
        while trainer.step < STEPS:
            trainer.train_step()
            for name, value in now(sequence).items():
                offline[name] = DECAY * offline[name] + (1 - DECAY) * value.double()
        sequence.method.after_task()
        for name, value in shown(sequence).items():
            torch.testing.assert_close(value.double(), offline[name], rtol=1e-5, atol=1e-7)
    assert max((offline[name] - value).abs().max() for name, value in now(sequence).items()) > 1e-3


def test_the_first_task_is_answered_by_the_only_adapter(data: Path) -> None:
    sequence = Sequence("lae", data)
    sequence.learn(TASKS[0])
    assert all(torch.equal(value, now(sequence)[name]) for name, value in shown(sequence).items())


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_extremes_are_the_online_adapter_and_the_first_one(data: Path, decay: float) -> None:
    sequence = Sequence("lae", data, decay=decay)
    sequence.learn(TASKS[0])
    first = now(sequence)
    sequence.learn(TASKS[1])
    expected = first if decay else now(sequence)
    for name, value in shown(sequence).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
