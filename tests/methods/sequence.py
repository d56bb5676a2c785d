"""A method on the tiny backbone, task after task, step by step: what the tests of methods share."""

from __future__ import annotations

from pathlib import Path

import torch

from cnext import methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.base import Method
from cnext.running.training import TaskTrainer
from cnext.tasks import formats, suites
from cnext.tasks.base import Recipe

TASKS = ("VQAv2", "Flickr30k", "HQEdit")
STEPS = 4
RECIPE = Recipe(dict.fromkeys(TASKS, STEPS), batch_size=4, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1)


class Sequence:
    """A method on the tiny backbone, task after task, step by step."""

    def __init__(self, name: str, data: Path, **hyperparameters: object) -> None:
        self.data, self.tiny = data, TinyBackbone.load()
        self.method: Method = methods.load(name)(**hyperparameters)
        self.method.setup(self.tiny, torch.Generator().manual_seed(0))

    def open(self, name: str) -> TaskTrainer | None:
        task = suites.load("next-tiny").task(name)
        self.parameters = self.method.trainable(self.tiny, task)
        if not self.parameters:
            return None
        samples = formats.read(task, self.data, "train")
        trainer = TaskTrainer(self.tiny, self.method, self.parameters, samples, RECIPE, STEPS, (0, name))
        self.method.before_task(self.parameters, STEPS)
        return trainer

    def learn(self, name: str) -> None:
        trainer = self.open(name)
        if trainer:
            while trainer.step < STEPS:
                trainer.train_step()
            self.method.after_task()

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.tiny.state_dict().items()}
