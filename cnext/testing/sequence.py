"""Train a method on the tiny backbone task by task, step by step, and interrupted, without a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

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
TRAIN, TEST = 32, 8
"""Samples of each task that `cnext.testing` generates."""


class Sequence:
    """A method on the tiny backbone, task after task, step by step.

    Args:
        method: its class, or its name.
        data: a folder with the files of next-tiny.
        hyperparameters: those that differ from their defaults.
    """

    def __init__(self, method: str | type, data: Path, **hyperparameters: Any) -> None:
        self.data, self.tiny, self.seen = data, TinyBackbone.load(), []
        kind = methods.load(method) if isinstance(method, str) else method
        self.method: Method = kind(**hyperparameters)
        tasks = [suites.load("next-tiny").task(name) for name in TASKS]
        self.method.setup(self.tiny, tasks, torch.Generator().manual_seed(0))

    def samples(self, name: str) -> list[Sample]:
        return formats.read_samples(suites.load("next-tiny").task(name), self.data, "train")

    def questions(self, name: str, count: int = 8) -> list[Sample]:
        """Test questions of a task, without answers."""
        task = suites.load("next-tiny").task(name)
        return [question(sample) for sample in formats.read_samples(task, self.data, "test")[:count]]

    def open(self, name: str, recipe: Recipe = RECIPE) -> TaskTrainer | None:
        """The trainer of a task before its first step; None where the method does not train it."""
        task = suites.load("next-tiny").task(name)
        self.parameters = self.method.trainable(task)
        if not self.parameters:
            return None
        trainer = TaskTrainer(self.tiny, self.method, self.parameters, self.samples(name), recipe, STEPS, (0, name))
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
        values = _stored({name: p.detach().clone() for name, p in other.method.adapter_parameters().items()})
        with torch.no_grad():
            for name, parameter in self.method.adapter_parameters().items():
                parameter.copy_(values[name])
        self.seen = list(other.seen)


def _stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as a checkpoint's file gives them back."""
    from safetensors.torch import load, save

    return load(save(tensors))


def train_rest(trainer: TaskTrainer) -> None:
    """Trains the rest of a task's steps, and does not end the task."""
    while trainer.step < STEPS:
        trainer.train_step()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two dictionaries have the same tensors to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def resumed(make: Callable[[], Sequence], stops: Iterable[int | None]) -> Iterator[Sequence]:
    """For each stop all tasks learnt with an interruption there.

    make: gives the method on a fresh backbone. stops: steps of the last task, ascending; None, first: before the task.
    """
    first, trainer = make(), None
    first.learn(*TASKS[:2])
    for stop in stops:
        if stop is not None and trainer is None:
            trainer = first.open(TASKS[2])
        while trainer and trainer.step < (stop or 0):
            trainer.train_step()
        kept = _stored(first.method.state_dict())
        moments = _stored(trainer.state_dict()) if trainer else {}
        second = make()
        second.restore(first)
        if stop is None:
            second.method.load_state_dict(kept)
        again = second.open(TASKS[2])
        if stop is not None:
            second.method.load_state_dict(kept)
        if again:
            again.load_state_dict(moments, stop or 0)
        second.finish(again)
        yield second
