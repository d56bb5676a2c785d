"""Train a method on the tiny backbone task by task, for the tests of methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load, save

from cnext import methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.base import Method
from cnext.tasks import formats, suites
from cnext.tasks.base import Recipe, Sample
from cnext.training.evaluation import question
from cnext.training.phases import finish_task
from cnext.training.trainer import TaskTrainer

TASKS = ("VQAv2", "Flickr30k", "HQEdit")
STEPS = 4
RECIPE = Recipe(dict.fromkeys(TASKS, STEPS), batch_size=4, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1)
SHORT = {"mr-lora": {"router_steps": 2}}
"""Hyperparameters that shorten what a method trains besides the steps of its tasks."""
VARIANTS = {
    "mage with pema-kron": ("mage", {"average": "pema-kron", "pull": 0.1}),
    "mage with A fixed": ("mage", {"average": "pema-kron", "a": "fixed", "pull": 0.1}),
}
"""Methods with other hyperparameters, by the name that tests call them: these also read frozen branches' gradients."""


class Sequence:
    """A method on the tiny backbone, task after task, step by step."""

    def __init__(self, name: str, data: Path, **hyperparameters: object) -> None:
        self.data, self.tiny, self.seen = data, TinyBackbone.load(), []
        name, chosen = VARIANTS.get(name, (name, {}))
        self.method: Method = methods.load(name)(**SHORT.get(name, {}) | chosen | hyperparameters)
        tasks = [suites.load("next-tiny").task(name) for name in TASKS]
        self.method.setup(self.tiny, tasks, torch.Generator().manual_seed(0))

    def samples(self, name: str) -> list[Sample]:
        return formats.read_samples(suites.load("next-tiny").task(name), self.data, "train")

    def open(self, name: str) -> TaskTrainer | None:
        task = suites.load("next-tiny").task(name)
        self.parameters = self.method.trainable(task)
        if not self.parameters:
            return None
        trainer = TaskTrainer(self.tiny, self.method, self.parameters, self.samples(name), RECIPE, STEPS, (0, name))
        self.seen = [*self.seen, name] if name not in self.seen else self.seen
        kept = self.method.card.rehearsal
        memory = {seen: self.samples(seen)[:kept] for seen in self.seen if kept}
        self.method.before_task(self.parameters, STEPS, memory)
        return trainer

    def learn(self, *names: str) -> None:
        for name in names:
            self.finish(self.open(name))

    def finish(self, trainer: TaskTrainer | None) -> None:
        """Trains the rest of a task's steps and ends the task."""
        if trainer:
            train_rest(trainer)
            finish_task(self.method)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors of the backbone and of the method's parameters beside it."""
        added = {f"method:{name}": parameter.detach() for name, parameter in self.method.adapter_parameters().items()}
        return {name: tensor.clone() for name, tensor in (self.tiny.state_dict() | added).items()}

    def restore(self, other: Sequence) -> None:
        """Takes another's parameters, as a resumed run does: from what a checkpoint stores, in its file format."""
        values = load(save({name: p.detach().clone() for name, p in other.method.adapter_parameters().items()}))
        with torch.no_grad():
            for name, parameter in self.method.adapter_parameters().items():
                parameter.copy_(values[name])
        self.seen = list(other.seen)


def train_rest(trainer: TaskTrainer) -> None:
    """Trains the rest of a task's steps, and does not end the task."""
    while trainer.step < STEPS:
        trainer.train_step()


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


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries have the same tensors to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def branches_of(parameters: dict[str, torch.Tensor]) -> set[str]:
    """The branches that parameters named "<layer>.<branch>.<A or B>" belong to."""
    return {name.split(".")[-2] for name in parameters}


def resume(name: str, data: Path, stop: int | None) -> Sequence:
    """All tasks learnt with an interruption after ``stop`` steps of the last one; None: before it."""
    first = Sequence(name, data)
    first.learn(*TASKS[:2])
    trainer = None if stop is None else first.open(TASKS[2])
    for _ in range(stop or 0):
        if trainer:
            trainer.train_step()
    kept = load(save(first.method.state_dict()))
    moments = load(save(trainer.state_dict())) if trainer else {}
    second = Sequence(name, data)
    second.restore(first)
    if stop is None:
        second.method.load_state_dict(kept)
    again = second.open(TASKS[2])
    if stop is not None:
        second.method.load_state_dict(kept)
    if again:
        again.load_state_dict(moments, stop or 0)
    second.finish(again)
    return second


def questions(data: Path, task: str, count: int = 8) -> list[Sample]:
    """Test questions of a task, without answers."""
    return [question(s) for s in formats.read_samples(suites.load("next-tiny").task(task), data, "test")[:count]]
