"""Train a method on the tiny backbone task by task, for the tests of methods: `cnext.testing.sequence`, and more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cnext import testing
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample
from cnext.testing.sequence import RECIPE, STEPS, TASKS, resumed, same, train_rest
from cnext.training.evaluation import question
from cnext.training.trainer import TaskTrainer

__all__ = [
    "RECIPE", "SHORT", "STEPS", "TASKS", "VARIANTS", "Sequence", "branches_of", "opened", "questions", "resume", "same",
    "squares_of", "train_rest",
]  # fmt: skip
SHORT = {"mr-lora": {"router_steps": 2}}
"""Hyperparameters that shorten what a method trains besides the steps of its tasks."""
VARIANTS = {
    "mage-paper with pema-kron": ("mage-paper", {"average": "pema-kron"}),
    "mage by roles": ("mage", {"trains": "roles", "pull": 0.1}),
}
"""Methods with other hyperparameters, by the name that tests call them: these also read frozen branches' gradients."""


class Sequence(testing.sequence.Sequence):
    """As the public one, with short and other hyperparameters by the method's name."""

    def __init__(self, name: str, data: Path, **hyperparameters: object) -> None:
        name, chosen = VARIANTS.get(name, (name, {}))
        super().__init__(name, data, **SHORT.get(name, {}) | chosen | hyperparameters)


def opened(name: str, data: Path, *tasks: str, **hyperparameters: object) -> tuple[Sequence, TaskTrainer]:
    """A method that has learnt all but the last of some tasks, and the trainer of the last."""
    sequence = Sequence(name, data, **hyperparameters)
    sequence.learn(*tasks[:-1])
    return sequence, sequence.open(tasks[-1])


@contextmanager
def squares_of(sequence: Sequence, trainer: TaskTrainer) -> Iterator[dict[str, torch.Tensor]]:
    """Sums the squares of the task's own gradients in the second half of the steps, in double precision."""
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in sequence.parameters.items()}
    plain = sequence.method.transform_gradients

    def observed(parameters: dict[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items() if trainer.step >= STEPS // 2 else ():
            squares[name] += parameter.grad.double() ** 2
        plain(parameters)

    sequence.method.transform_gradients = observed
    yield squares
    del sequence.method.transform_gradients


def branches_of(parameters: dict[str, torch.Tensor]) -> set[str]:
    """The branches that parameters named "<layer>.<branch>.<A or B>" belong to."""
    return {name.split(".")[-2] for name in parameters}


def resume(name: str, data: Path, stop: int | None) -> Sequence:
    """All tasks learnt with an interruption after ``stop`` steps of the last one; None: before it."""
    return next(resumed(lambda: Sequence(name, data), [stop]))


def questions(data: Path, task: str, count: int = 8) -> list[Sample]:
    """Test questions of a task, without answers."""
    return [question(s) for s in formats.read_samples(suites.load("next-tiny").task(task), data, "test")[:count]]
