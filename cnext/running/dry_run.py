"""``cnext-run --dry-run``: the plan, and an estimate of time and disk from a few steps timed on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from cnext import backbones, methods
from cnext.backbones.base import Backbone
from cnext.methods.base import Method
from cnext.running.batches import stable_seed
from cnext.running.config import Plan
from cnext.running.evaluation import question
from cnext.running.pace import duration
from cnext.running.training import TaskTrainer
from cnext.tasks import formats, synthetic
from cnext.tasks.base import Sample

TIMED_STEPS, TIMED_SAMPLES = 3, 32


class Estimate(NamedTuple):
    """The plan of a run as text, the seconds that it takes and the bytes of its checkpoints."""

    text: str
    seconds: float
    size: int


def estimate(planned: Plan) -> Estimate:
    """Times ``TIMED_STEPS`` steps and ``TIMED_SAMPLES`` answers of every task. Leaves no file."""
    config, recipe = planned.config, planned.recipe
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = config.data
        if data is None:
            data = synthetic.write_next_tiny(Path(scratch) / "data", TIMED_SAMPLES, TIMED_SAMPLES)
        backbone = backbones.load(config.backbone).load(planned.device)
        method = methods.load(config.method)(**planned.hyperparameters)
        tasks = [planned.suite.task(name) for name in planned.order]
        method.setup(backbone, tasks, torch.Generator().manual_seed(stable_seed(config.seed, "adapters")))
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
            with method.for_eval():
                method.answer([question(sample) for sample in test], task.max_new_tokens, task)
            answers = (time.perf_counter() - started) / len(test) * (recipe.test_samples or len(test))
            training = step_seconds * recipe.steps[name]
            # A task is answered zero-shot, after its own training, and after every later task.
            total += training + answers * (2 if method.joint else 1 + len(planned.order) - index)
            reads, writes = "+".join(task.reads), "+".join(task.writes)
            steps = recipe.steps[name] if trained else 0
            times = f"{duration(training)}, {duration(answers)}"
            lines.append(f"{name:<12} {reads:<12} {writes:<8} {steps:>6} {trained:>10,}   {times}")
        state = [*method.held().values(), *method.state_dict().values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in state) * len(planned.order)
    lines.append(f"estimated time: {duration(total)}, and what it takes to load data, model and libraries")
    lines.append(f"estimated disk: {size / 1e6:.1f} MB of checkpoints, and the answers")
    lines.append(f"run folder: {config.folder}")
    return Estimate("\n".join(lines), total, size)


def estimate_study(plans: list[Plan], jobs: int) -> str:
    """The plan of every method and order, timed with its first seed, and the totals over all runs."""
    groups: dict[tuple[str, str | None], list[Plan]] = {}
    for planned in plans:
        groups.setdefault((planned.config.method, planned.config.order), []).append(planned)
    texts, seconds, size = [], [], 0
    for group in groups.values():
        found = estimate(group[0])
        seconds += [found.seconds] * len(group)
        size += found.size * len(group)
        others = "".join(f"\nthe same with seed {other.config.seed}: {other.config.folder}" for other in group[1:])
        texts.append(found.text + others)
    # No run is split: the study takes at least as long as its longest.
    together = max(sum(seconds) / jobs, *seconds)
    times = f"{duration(sum(seconds))} one after another, about {duration(together)} with {jobs} at a time"
    texts.append(f"all {len(plans)} runs: {times}; {size / 1e6:.1f} MB of checkpoints")
    return "\n\n".join(texts)


def _time_steps(planned: Plan, backbone: Backbone, method: Method, train: list[Sample], name: str) -> tuple[int, float]:
    parameters = method.trainable(planned.suite.task(name))
    if not parameters:
        return 0, 0.0
    trainer = TaskTrainer(backbone, method, parameters, train, planned.recipe, TIMED_STEPS + 1, ("dry-run", name))
    memory = {name: train[: method.card.rehearsal]} if method.card.rehearsal else {}
    method.before_task(parameters, TIMED_STEPS + 1, memory)
    trainer.train_step()
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.train_step()
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    method.after_task()
    return sum(parameter.numel() for parameter in parameters.values()), seconds
