"""The preset `released` against the released training loop, stated again: 20 steps of three tasks on a small SEED-X."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cnext import adapters, methods
from cnext.backbones.base import Backbone
from cnext.backbones.seed_x.model import SeedX
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.methods.base import Method
from cnext.tasks.base import Sample
from cnext.training import trainer
from cnext.training.batches import Batches, stable_seed
from cnext.training.setup import Prepared, trained_beside

STEPS = 20
TASKS = ("VQAv2", "Flickr30k", "HQEdit")
FROZEN = {"VQAv2": ["image-expert"], "Flickr30k": ["image-general", "text-expert"], "HQEdit": ["text-expert"]}
"""The branches that the released loop freezes, by the data set's name."""


def rate(step: int, warmup: int, steps: int) -> float:
    """Of an optimizer step, from 0: the scheduler advances at each of two micro-batches, and once before the first."""
    place, end = 2 * step + 1, steps + 1
    if place < warmup:
        return 1e-4 * place / warmup
    return 1e-4 * 0.5 * (1.05 + 0.95 * math.cos(math.pi * (place - warmup) / (end - warmup)))


def released_loop(
    backbone: Backbone, method: Method, every: dict[str, nn.Parameter], samples: list[Sample], task: str, warmup: int
) -> None:
    """One task: AdamW over all trained tensors as one flat one, frozen branches included, whose gradients are zero."""
    frozen = adapters.branch_parameters(method.model, FROZEN[task])
    for name, parameter in every.items():
        parameter.requires_grad_(name not in frozen)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in every.items()}
    batches = Batches(backbone, samples, 2, (0, task))
    backbone.train()
    for step in range(STEPS):
        torch.manual_seed(stable_seed(0, task, "step", step))  # so that the dropout masks are the same
        gradients = {name: torch.zeros_like(p) for name, p in every.items()}
        batch = batches.at(step, STEPS)
        for part in (batch[:1], batch[1:]):
            method.before_step(part)
            (backbone.loss(part).total / 2).backward()
        for name, parameter in every.items():
            if parameter.grad is not None:
                gradients[name], parameter.grad = parameter.grad, None
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        lr = rate(step, warmup, STEPS)
        for name, parameter in every.items():
            adamw(parameter, gradients[name] * min(1.0, 1.0 / (norm + 1e-6)), *moments[name], lr, step + 1)


@torch.no_grad()
def adamw(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: float, count: int) -> None:
    parameter.mul_(1 - lr * 0.05)
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.98).addcmul_(gradient, gradient, value=0.02)
    root = (second / (1 - 0.98**count)).sqrt()
    parameter.sub_(first / (1 - 0.9**count) / (root + 1e-6) * lr)


def trained(
    folder: Path, tasks: dict[str, list[Sample]], ours: bool, method: str
) -> tuple[list[dict[str, Tensor]], Prepared]:
    """Everything that is trained, after each task."""
    config = RunConfig(
        suite="continual-next", preset="released", method=method, backbone="seed-x", weights=folder, batch_size=2,
        micro_batch_size=1, precision="float32",
    )  # fmt: skip
    planned = plan(config, forecast=True)
    planned = dataclasses.replace(planned, recipe=dataclasses.replace(planned.recipe, checkpointing=False))
    backbone, made = SeedX.load(weights=folder, steps=2), methods.load(method)(**planned.hyperparameters)
    made.setup(backbone, [planned.suite.task(name) for name in TASKS], torch.Generator().manual_seed(0))
    extras = trained_beside(backbone, planned.recipe.trainable)
    ready, after = Prepared({}, backbone, made, extras), []
    every = made.adapter_parameters() | extras
    for name in TASKS:
        if ours:
            own = made.trainable(planned.suite.task(name))
            training = trainer.begin(planned, ready, planned.suite.task(name), own, tasks[name], STEPS, {})
            backbone.train()
            while training.step < STEPS:
                training.train_step()
            training.finish()
        else:
            released_loop(backbone, made, every, tasks[name], name, planned.recipe.of(name).warmup_steps)
        after.append({label: parameter.detach().clone() for label, parameter in every.items()})
    return after, ready


def test_three_tasks_are_those_of_the_released_loop(folder: Path, tasks: dict[str, list[Sample]]) -> None:
    ours, ready = trained(folder, tasks, True, "mage-paper")
    theirs, _ = trained(folder, tasks, False, "mage-paper")
    for one, other in zip(ours, theirs, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-7, msg=name)
    layer = next(iter(adapters.layers(ready.method.model).values()))
    assert (layer.dropout, layer.independent) == (0.05, True)
    moved = {name for name, tensor in ours[0].items() if not torch.equal(tensor, ours[1][name])}
    assert len(moved) == len(ours[0]), "what a task does not train or use decays"


def test_initial_values_and_decay(folder: Path, tasks: dict[str, list[Sample]]) -> None:
    """A begins with a standard deviation of 0.01; a frozen branch shrinks by the product over the steps' rates."""
    after, _ = trained(folder, {name: samples[:1] for name, samples in tasks.items()}, True, "mage-paper")
    frozen = [name for name in after[0] if ".image-general.A" in name]
    values = torch.cat([after[0][name].flatten() for name in frozen])
    assert float(values.std()) == pytest.approx(0.01, rel=0.05)
    factor = math.prod(1 - rate(step, 125, STEPS) * 0.05 for step in range(STEPS))
    for name in frozen:
        torch.testing.assert_close(after[1][name], after[0][name] * factor, rtol=1e-6, atol=0)
