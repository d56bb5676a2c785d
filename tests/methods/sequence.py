"""A method on the tiny backbone, task after task, step by step: what the tests of methods share."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save

from cnext import methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.base import Method
from cnext.tasks import formats, suites
from cnext.tasks.base import Recipe, Sample
from cnext.training.trainer import TaskTrainer

TASKS = ("VQAv2", "Flickr30k", "HQEdit")
STEPS = 4
RECIPE = Recipe(dict.fromkeys(TASKS, STEPS), batch_size=4, learning_rate=1e-2, warmup_steps=1, weight_decay=0.1)

QUICK = {"mr-lora": {"router_steps": 2}}
"""What makes a method's training beside the steps of its tasks as short as they are."""


class Sequence:
    """A method on the tiny backbone, task after task, step by step."""

    def __init__(self, name: str, data: Path, **hyperparameters: object) -> None:
        self.data, self.tiny, self.seen = data, TinyBackbone.load(), []
        self.method: Method = methods.load(name)(**QUICK.get(name, {}) | hyperparameters)
        tasks = [suites.load("next-tiny").task(name) for name in TASKS]
        self.method.setup(self.tiny, tasks, torch.Generator().manual_seed(0))

    def samples(self, name: str) -> list[Sample]:
        return formats.read(suites.load("next-tiny").task(name), self.data, "train")

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

    def learn(self, name: str) -> None:
        trainer = self.open(name)
        if trainer:
            while trainer.step < STEPS:
                trainer.train_step()
            self.method.after_task()

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the backbone, and of what the method holds beside it, as they are now."""
        held = {f"held:{name}": parameter.detach() for name, parameter in self.method.held().items()}
        return {name: tensor.clone() for name, tensor in (self.tiny.state_dict() | held).items()}

    def restore(self, other: Sequence) -> None:
        """Goes on where another stands, as a resumed run does: from what a checkpoint holds, in its file format."""
        values = load(save({name: p.detach().clone() for name, p in other.method.held().items()}))
        with torch.no_grad():
            for name, parameter in self.method.held().items():
                parameter.copy_(values[name])
        self.seen = list(other.seen)
