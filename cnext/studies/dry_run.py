"""``cnext-run --dry-run``: print the plan, and estimate time and disk from a few steps timed on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from cnext.config.plan import Plan
from cnext.monitoring.eta import duration
from cnext.tasks.base import Sample, Task
from cnext.training.evaluation import answer
from cnext.training.precision import autocast
from cnext.training.setup import HELD_OUT_SAMPLES, Prepared, prepare, reference_warnings
from cnext.training.trainer import begin

SAMPLES = ("train_samples", "test_samples")
TIMED_STEPS, TIMED_SAMPLES = 3, 32


class Estimate(NamedTuple):
    """The plan of a run as text, its estimated seconds, and the bytes of its checkpoints."""

    text: str
    seconds: float
    size: int


def estimate(planned: Plan) -> Estimate:
    """Times ``TIMED_STEPS`` steps and ``TIMED_SAMPLES`` answers of every task.

    Writes no file outside of the cache, which gets the images that tables hold as bytes.

    Raises:
        UserError: for whatever would stop the run from starting.
    """
    config, recipe = planned.config, planned.recipe
    torch.set_num_threads(config.threads)
    # Users' data are read completely, as errors may be in the last row; of synthetic data a few rows are generated.
    few = {name: min(TIMED_SAMPLES, getattr(recipe, name) or TIMED_SAMPLES) for name in SAMPLES}
    small = dataclasses.replace(planned, recipe=dataclasses.replace(recipe, **few))
    with tempfile.TemporaryDirectory() as scratch:
        ready = prepare(planned if config.data else small, Path(scratch))
        method = ready.method
        heading = f"plan: {config.method} on {config.backbone}, suite {planned.suite.name} ({config.preset})"
        lines = [
            f"{heading}, order {config.order}, seed {config.seed}, device {planned.device}",
            f"{'task':<12} {'reads':<12} {'writes':<8} {'steps':>6} {'trained':>10}   time to train, to evaluate once",
        ]
        total = 0.0
        evaluations = {task.name: times for task, times in planned.asked}
        for name in planned.order:
            task = planned.suite.task(name)
            trained, step_seconds = _time_steps(planned, ready, task) if recipe.steps[name] else (0, 0.0)
            test = ready.samples[config.split][name]
            questions = len(test) if config.data else recipe.test_samples or len(test)
            answers = _time_answers(planned, ready, task, test[:TIMED_SAMPLES]) * questions
            training = step_seconds * recipe.steps[name]
            total += training + answers * evaluations.pop(name)
            reads, writes = "+".join(task.reads), "+".join(task.writes)
            steps = recipe.steps[name] if trained else 0
            times = f"{duration(training)}, {duration(answers)}"
            lines.append(f"{name:<12} {reads:<12} {writes:<8} {steps:>6} {trained:>10,}   {times}")
        for name, times in evaluations.items():
            task, test = planned.suite.task(name), ready.samples[config.split][name]
            questions = len(test) if config.data else min(recipe.test_samples or len(test), HELD_OUT_SAMPLES)
            answers = _time_answers(planned, ready, task, test[:TIMED_SAMPLES]) * questions
            total += answers * times
            reads, writes = "+".join(task.reads), "+".join(task.writes)
            lines.append(f"{name:<12} {reads:<12} {writes:<8} {'held out':>17}   none, {duration(answers)}")
        state = [*ready.saved_parameters().values(), *method.state_dict().values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in state) * len(planned.order)
    lines += [*ready.left_out.lines(), *reference_warnings(planned, ready.samples)]
    lines.append(f"estimated time: {duration(total)}, plus loading of data, model and libraries")
    lines.append(f"estimated disk: {size / 1e6:.1f} MB of checkpoints, plus the answers")
    lines.append(f"run folder: {config.folder}")
    return Estimate("\n".join(lines), total, size)


def estimate_study(plans: list[Plan], jobs: int) -> str:
    """The plan of every method and order, timed for its first seed, and the totals over all runs."""
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
    # A study takes at least as long as its longest run.
    parallel = max(sum(seconds) / jobs, *seconds)
    times = f"{duration(sum(seconds))} in sequence, about {duration(parallel)} with {jobs} in parallel"
    texts.append(f"all {len(plans)} runs: {times}; {size / 1e6:.1f} MB of checkpoints")
    return "\n\n".join(texts)


def _time_steps(planned: Plan, ready: Prepared, task: Task) -> tuple[int, float]:
    """Number of trained parameters of a task, and seconds per step."""
    parameters = ready.method.trainable(task)
    if not parameters:
        return 0, 0.0
    samples, stored = ready.samples["train"][task.name], ready.method.card.rehearsal
    memory = {task.name: samples[:stored]} if stored else {}
    trainer = begin(planned, ready, task, parameters, samples, TIMED_STEPS + 1, memory)
    ready.backbone.train()
    trainer.train_step()
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        trainer.train_step()
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    trainer.finish()
    return sum(parameter.numel() for parameter in trainer.parameters.values()), seconds


def _time_answers(planned: Plan, ready: Prepared, task: Task, samples: list[Sample]) -> float:
    """Seconds per answer."""
    started = time.perf_counter()
    with autocast(planned.recipe.precision, ready.backbone.device), ready.method.for_eval():
        # A method that is told the task of a question knows those of the order alone.
        answer(
            ready.method, task, samples, None if task.name in planned.order else planned.suite.task(planned.order[0])
        )
    return (time.perf_counter() - started) / len(samples)
