"""``cnext-run --dry-run``: the plan, and an estimate of time and disk from a few steps timed on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from cnext import adapters, backbones, methods
from cnext.backbones.base import Backbone
from cnext.methods.base import Method
from cnext.running.config import Plan
from cnext.running.training import TaskTrainer, stable_seed
from cnext.tasks import formats, synthetic
from cnext.tasks.base import Sample

TIMED_STEPS, TIMED_SAMPLES = 3, 32


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def estimate(planned: Plan) -> str:
    """The plan as text: ``TIMED_STEPS`` steps and ``TIMED_SAMPLES`` answers of every task are timed. Leaves no file."""
    config, recipe = planned.config, planned.recipe
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = config.data
        if data is None:
            data = synthetic.write_next_tiny(Path(scratch) / "data", TIMED_SAMPLES, TIMED_SAMPLES)
        backbone = backbones.load(config.backbone).load(planned.device)
        method = methods.load(config.method)(**planned.hyperparameters)
        method.setup(backbone, torch.Generator().manual_seed(stable_seed(config.seed, "adapters")))
        small = dataclasses.replace(recipe, train_samples=TIMED_SAMPLES, test_samples=TIMED_SAMPLES)
        heading = f"plan: {config.method} on {config.backbone}, suite {planned.suite.name} ({config.budget})"
        lines = [
            f"{heading}, order {config.order}, seed {config.seed}, device {planned.device}",
            f"{'task':<12} {'reads':<12} {'writes':<8} {'steps':>6} {'trained':>10}   time to train, to answer once",
        ]
        total = 0.0
        for index, name in enumerate(planned.order):
            task = planned.suite.task(name)
            train = formats.read(task, data, "train", small.train_samples)
            test = formats.read(task, data, config.split, small.test_samples)
            trained, step_seconds = _time_steps(planned, backbone, method, train, name)
            started = time.perf_counter()
            backbone.generate(test, task.max_new_tokens)
            answers = (time.perf_counter() - started) / len(test) * (recipe.test_samples or len(test))
            training = step_seconds * recipe.steps[name]
            # A task is answered zero-shot, after its own training, and after every later task.
            total += training + answers * (1 + len(planned.order) - index)
            reads, writes = "+".join(task.reads), "+".join(task.writes)
            steps = recipe.steps[name] if trained else 0
            times = f"{_duration(training)}, {_duration(answers)}"
            lines.append(f"{name:<12} {reads:<12} {writes:<8} {steps:>6} {trained:>10,}   {times}")
        parameters = adapters.branch_parameters(backbone.language_model).values()
        state = [*parameters, *method.state_dict().values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in state)
    lines.append(f"estimated time: {_duration(total)}, and what it takes to load data, model and libraries")
    lines.append(f"estimated disk: {size * len(planned.order) / 1e6:.1f} MB of checkpoints, and the answers")
    lines.append(f"run folder: {config.folder}")
    return "\n".join(lines)


def _time_steps(planned: Plan, backbone: Backbone, method: Method, train: list[Sample], name: str) -> tuple[int, float]:
    parameters = method.trainable(backbone, planned.suite.task(name))
    if not parameters:
        return 0, 0.0
    trainer = TaskTrainer(backbone, method, parameters, train, planned.recipe, TIMED_STEPS + 1, ("dry-run", name))
    method.before_task(parameters, TIMED_STEPS + 1)
    trainer.train_step()
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.train_step()
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    method.after_task()
    return sum(parameter.numel() for parameter in parameters.values()), seconds
