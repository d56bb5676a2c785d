"""``cnext-run --dry-run --gpus N``: estimate time, memory and disk of a run on N GPUs from parameter and FLOP counts.

Nothing is loaded: the model is built on the meta device, and sample counts are the published ones of the suite. The
text lists the assumed figures of the hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cnext import backbones, methods, packages
from cnext.backbones.base import Backbone
from cnext.config.plan import Plan
from cnext.errors import UserError
from cnext.methods.base import Method
from cnext.tasks import suites
from cnext.tasks.base import Task
from cnext.training.batches import stable_seed
from cnext.training.precision import DTYPES
from cnext.training.setup import HELD_OUT_SAMPLES

TEXT_TOKENS = 64
"""Assumed text tokens of a training sample, question and answer together."""
ANSWER_TOKENS = 8
"""Assumed tokens of a text answer."""
BANDWIDTH = 2e12
"""Assumed memory bandwidth of a GPU in bytes per second while decoding (an H100 at 60% of its peak)."""
TERAFLOPS = 400.0
"""Sustained TFLOP/s of a GPU, if --tflops is not given (an H100 at 40% of its peak)."""
DECODING_BATCH = 16
"""Assumed number of answers decoded at once."""


@dataclass(frozen=True)
class Sizes:
    """Parameter counts: of the language model's layers, of everything that is loaded, of what checkpoints hold
    (adapters and what is trained beside them), and of what some task trains."""

    language: int
    loaded: int
    added: int
    trained: int


def text(planned: Plan, gpus: int, teraflops: float) -> str:
    """The forecast of a run on ``gpus`` GPUs of ``teraflops`` sustained TFLOP/s each.

    Raises:
        UserError: the backbone's sizes are not known without its weights, or a batch cannot be divided by ``gpus``.
    """
    if gpus < 1 or not 0 < teraflops < math.inf:
        raise UserError(f"--gpus must be at least 1 and --tflops above 0 and finite, got {gpus} and {teraflops}")
    config, recipe = planned.config, planned.recipe
    uneven = [name for name in planned.order if recipe.of(name).batch_size % gpus]
    if uneven:
        raise UserError(f"--gpus {gpus} does not divide the batch size of {', '.join(uneven)}; give another number")
    packages.require(*packages.needed(config.backbone))
    backbone = backbones.load(config.backbone).meta(config.weights)
    method = methods.load(config.method)(**planned.hyperparameters)
    tasks = [planned.suite.task(name) for name in planned.order]
    generator = torch.Generator().manual_seed(stable_seed(config.seed, "adapters"))
    method.setup(backbone, tasks, generator, planned.suite.modalities)
    sizes = _sizes(backbone, method, tasks, recipe.trainable)
    what = f"{config.method} on {config.backbone}, suite {planned.suite.name} ({config.preset})"
    counts = f"{sizes.loaded:,}, {sizes.language:,} of them in the language model; {sizes.trained:,} trained"
    lines = [
        f"forecast: {what}, order {config.order}, {gpus} GPUs, {recipe.precision}",
        f"parameters: {counts} ({recipe.trainable})",
        f"{'task':<12} {'steps':>7} {'batch':>6} {'samples':>10} {'epochs':>7} {'tokens':>15} {'hours':>7}",
    ]
    hours, memory = 0.0, 0.0
    for task in tasks:
        own = recipe.of(task.name)
        steps, length = own.steps[task.name], tokens(backbone, task)
        samples = steps * own.batch_size
        flops = samples * (training_flops(sizes.language, length, own.checkpointing) + backbone.encoding_flops(task))
        spent = flops / (gpus * teraflops * 1e12) / 3600
        hours += spent
        micro = own.micro_batch_size or own.batch_size // gpus
        memory = max(memory, _memory(backbone, method, sizes, recipe.precision, own.checkpointing, micro * length))
        count = own.train_samples or task.train_count
        epochs = f"{samples / count:.1f}" if count else "?"
        lines.append(
            f"{task.name:<12} {steps:>7,} {own.batch_size:>6} {samples:>10,} {epochs:>7} {samples * length:>15,} "
            f"{spent:>7.1f}"
        )
    questions = _questions(planned, tasks)
    answering = sum(
        count * _answer_seconds(backbone, task, sizes, recipe.precision, teraflops) for task, count in questions
    )
    answering /= gpus * 3600
    pictures = sum(count for task, count in questions if "image" in task.writes)
    size = _disk(method, sizes, len(tasks))
    counts = f"{sum(count for _, count in questions):,} questions, {pictures:,} of them with image answers"
    machine = (
        f"{teraflops:g} TFLOP/s and {BANDWIDTH / 1e12:g} TB/s per GPU, {DECODING_BATCH} answers at once, no padding"
    )
    lines += [
        f"evaluation: {counts}: {answering:.1f} hours",
        f"time: {hours + answering:.1f} hours",
        f"memory per GPU: {memory / 1e9:.1f} GB while training, with the whole model on each",
        f"disk: {size / 1e9:.1f} GB of checkpoints, and the answers",
        f"assumed: {machine}, {TEXT_TOKENS} text tokens per sample, {ANSWER_TOKENS} per answer; nothing was measured",
    ]
    return "\n".join(lines)


def training_flops(parameters: int, positions: int, checkpointing: bool) -> float:
    """FLOPs of a training step on ``positions`` tokens through a frozen model with small trained adapters.

    Two per parameter and position for the forward pass and two for the gradient of the activations; gradient
    checkpointing adds a forward pass. Frozen weights need no gradient, which would be two more (6 N D in all).
    """
    return 2.0 * parameters * positions * (3 if checkpointing else 2)


def tokens(backbone: Backbone, task: Task) -> int:
    """Positions of a training sample in the language model, with text of the assumed length."""
    read, written = backbone.picture_tokens
    return TEXT_TOKENS + read * ("image" in task.reads) + written * ("image" in task.writes)


def _sizes(backbone: Backbone, method: Method, tasks: Sequence[Task], trainable: str) -> Sizes:
    own = {id(p): p.numel() for p in method.adapter_parameters().values()}
    # A method with phases of its own may train any of its parameters there.
    within_tasks = {id(p) for task in tasks for p in method.trainable(task).values()}
    trained = {k: n for k, n in own.items() if k in within_tasks or type(method).phases is not Method.phases}
    extras = {} if trainable == "branches" else backbone.connections()
    if trainable == "released":
        extras |= backbone.released_extras()
    beside = {id(p): p.numel() for p in extras.values()}
    language = sum(p.numel() for p in backbone.language_model.parameters())
    loaded = {id(p): p.numel() for p in backbone.parameters()} | own
    return Sizes(language, *(sum(part.values()) for part in (loaded, own | beside, trained | beside)))


def extra_bytes(method: str) -> str:
    """What a method stores after the six tasks of next-tiny on the tiny backbone, as text for its card."""
    made, suite = methods.load(method)(), suites.load("next-tiny")
    made.setup(backbones.load("tiny").load(), suite.tasks, torch.Generator().manual_seed(0))
    count = made.extra_bytes(len(suite.tasks))
    return f"{count:,} at most besides one adapter of rank 32, after the tasks of next-tiny on the tiny backbone"


def _memory(
    backbone: Backbone, method: Method, sizes: Sizes, precision: str, checkpointing: bool, positions: int
) -> float:
    """Bytes of weights, trained parameters with gradient and two moments in float32, method state and activations."""
    width = DTYPES[precision].itemsize
    config: Any = backbone.language_model.config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # A layer stores about 8 activations of the hidden size and 3 of the inner size. With checkpointing only one layer
    # does, the others store their input. Logits of a quarter of the positions are stored twice in float32.
    layer = positions * (8 * hidden + 3 * inner) * width
    kept = layers * positions * hidden * width + layer if checkpointing else layers * layer
    logits = positions / 4 * config.vocab_size * 8
    trained_bytes = sizes.trained * (16 + width)
    # During a task, a method needs about twice the memory of what it stores after it.
    return (sizes.loaded - sizes.trained) * width + trained_bytes + 2 * method.extra_bytes(1) + kept + logits


def _questions(planned: Plan, tasks: list[Task]) -> list[tuple[Task, int]]:
    """Each task and held-out set with its number of answers at all stages."""
    counts = [(task, planned.recipe.test_samples or task.test_count, times) for task, times in planned.asked]
    return [(task, (count if task in tasks else min(count, HELD_OUT_SAMPLES)) * times) for task, count, times in counts]


def _answer_seconds(backbone: Backbone, task: Task, sizes: Sizes, precision: str, teraflops: float) -> float:
    reading = 2 * sizes.language * tokens(backbone, task) + backbone.encoding_flops(task)
    written = ANSWER_TOKENS + backbone.picture_tokens[1] * ("image" in task.writes)
    drawing = backbone.drawing_flops if "image" in task.writes else 0.0
    words = written * sizes.language * DTYPES[precision].itemsize / BANDWIDTH / DECODING_BATCH
    return (reading + drawing) / (teraflops * 1e12) + words


def _disk(method: Method, sizes: Sizes, tasks: int) -> float:
    """Bytes of a checkpoint after every task and of two within a task, with the optimizer's moments, in float32."""
    return (4 * sizes.added + method.extra_bytes(tasks)) * tasks + 2 * (4 * sizes.added + 8 * sizes.trained)
