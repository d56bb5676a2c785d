"""Load what a run needs: data, backbone, method, and the CLIP model that scores images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnext import backbones, methods, packages
from cnext.backbones.base import Backbone
from cnext.config.plan import Plan, loading_options
from cnext.errors import UserError
from cnext.methods.base import Method
from cnext.scoring.clip import load_clip, needs_open_clip
from cnext.tasks import formats
from cnext.tasks.base import DataError, Sample
from cnext.tasks.generated import generator
from cnext.tasks.kept_images import cache
from cnext.tasks.left_out import RELEASED_LENGTH, TOO_LONG, LeftOut
from cnext.training import initial
from cnext.training.batches import stable_seed
from cnext.training.evaluation import question
from cnext.training.initial import Initial
from cnext.training.precision import DTYPES, in_float32

Samples = dict[str, dict[str, list[Sample]]]
"""Samples by split and by the task's name."""
HELD_OUT_SAMPLES = 200
"""Most samples of a held-out set: it is evaluated after every stage."""
SKIP = "correct these rows, or leave them out with --on-bad-row skip"


@dataclass(frozen=True)
class Prepared:
    """The loaded parts of a run.

    Attributes:
        samples: as `read_suite` returns them.
        extras: as `trained_beside` returns them.
        encoded: training samples as `Batches` encodes them, by the task's name, for the runs of one process to share.
            None: they are not kept.
        left_out: rows of the data that are not among the samples.
        initial: what the run starts from, once zero-shot is evaluated; None: the pretrained state.
    """

    samples: Samples
    backbone: Backbone
    method: Method
    extras: dict[str, nn.Parameter]
    encoded: dict[str, list[Any]] | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    initial: Initial | None = None

    @property
    def notes(self) -> list[str]:
        """What the user should know of ``initial``."""
        return [] if self.initial is None else self.initial.notes

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that a checkpoint stores, by name: the method's and the extras."""
        return self.method.adapter_parameters() | self.extras


def prepare(planned: Plan, generated: Path | None = None) -> Prepared:
    """Reads the data and loads the models. A dry run does this as well, so it raises the same errors as a run.

    generated: folder to generate a synthetic suite in, instead of the cache.
    """
    # Missing files and packages are reported before anything large is read or downloaded.
    check_model(planned)
    check_clip(planned, planned.device)
    left, skip = LeftOut(), planned.config.on_bad_row == "skip"
    data = data_folder(planned, generated)
    samples = read_suite(planned, data, left)
    backbone = load_backbone(planned)
    limits = {name: planned.suite.task(name).length_filter for name in planned.order}
    samples = check_lengths(backbone, samples, skip, left, limits)
    refuse_empty(planned, data, samples, left)
    method = methods.load(planned.config.method)(**planned.hyperparameters)
    generator = torch.Generator().manual_seed(stable_seed(planned.config.seed, "adapters"))
    method.setup(backbone, initial.tasks_of(planned), generator, planned.suite.modalities)
    extras = trained_beside(backbone, planned.recipe.trainable)
    ready = Prepared(samples, backbone, method, extras, left_out=left)
    return replace(ready, initial=initial.read(planned, backbone, method, ready.saved_parameters()))


def check_model(planned: Plan) -> None:
    """Raises UserError where weights are missing, or the backbone cannot read or write what a task does."""
    config = planned.config
    names = [*planned.order, *planned.held_out]
    backbones.check_tasks(config.backbone, config.weights, map(planned.suite.task, names))
    backbones.load(config.backbone).check(config.weights)


def data_folder(planned: Plan, generated: Path | None = None) -> Path:
    """The folder with the suite's files. A synthetic suite is generated first, in the cache or in ``generated``."""
    recipe = planned.recipe
    if planned.config.data is not None:
        return planned.config.data
    made = generator(planned.suite.synthetic)
    name = f"{planned.suite.name}-v{made.version}-{recipe.train_samples}-{recipe.test_samples}"
    return made.write((generated or cache()) / name, recipe.train_samples, recipe.test_samples)


def read_suite(planned: Plan, data: Path, left: LeftOut | None = None) -> Samples:
    """The samples of a run: split ("train" and the one evaluated) to task name to samples. Held-out sets follow the
    tasks in the latter, the first `HELD_OUT_SAMPLES` of each.

    left: gets the rows that are left out.

    Raises:
        DataError: lists every unusable row of every file, or says why nothing is left of one.
    """
    limits: dict[str, int] = {"train": planned.recipe.train_samples, planned.config.split: planned.recipe.test_samples}
    samples: Samples = {split: {} for split in limits}
    need = backbones.unmet_need(planned.config.backbone, weights=planned.config.weights)
    problems, skip, skippable = [], planned.config.on_bad_row == "skip", False
    few = min(planned.recipe.test_samples or HELD_OUT_SAMPLES, HELD_OUT_SAMPLES)
    wanted = [(name, limits) for name in planned.order]
    wanted += [(name, {planned.config.split: few}) for name in planned.held_out]
    for name, limits in wanted:
        for split, limit in limits.items():
            try:
                task = planned.suite.task(name)
                samples[split][name] = formats.read_samples(task, data, split, limit, need, skip, left)
            except DataError as error:
                problems.append(str(error))
                skippable = skippable or isinstance(error, formats.UnusableRows)
    if problems:
        raise DataError("\n".join([*problems, SKIP] if skippable else problems))
    if planned.recipe.draws == "epoch":
        tasks = {name: planned.suite.task(name) for name in planned.order}
        train = samples["train"].items()
        samples["train"] = {name: [formats.redrawn(one, tasks[name]) for one in listed] for name, listed in train}
    return samples


def reference_warnings(planned: Plan, samples: Samples) -> list[str]:
    """A line for each task with references to which no answer can be right, or whose scores are not as published."""
    read = samples[planned.config.split]
    lines = (formats.usable_flaws(planned.suite.task(name), read[name]) for name in planned.order)
    return [line for line in lines if line]


def check_lengths(
    backbone: Backbone,
    samples: Samples,
    skip: bool = False,
    left: LeftOut | None = None,
    limits: Mapping[str, int] | None = None,
) -> Samples:
    """Asks the backbone about every sample of a run, and returns those that it can read and that are short enough.

    Args:
        skip: whether those that it cannot read are left out, and not refused.
        left: gets the samples that are left out.
        limits: `Task.length_filter` by the task's name.

    Raises:
        DataError: names all that the backbone cannot read.
    """
    problems, left = [], LeftOut() if left is None else left
    kept: Samples = {split: {name: [] for name in by_task} for split, by_task in samples.items()}
    for split, by_task in samples.items():
        for name, sample in ((name, one) for name, listed in by_task.items() for one in listed):
            limit = (limits or {}).get(name, 0) if split == "train" else 0
            if limit and (length := backbone.length(sample) or 0) >= limit:
                left.add(name, split, RELEASED_LENGTH, f"{sample.origin}: {length} tokens")
                continue
            try:
                backbone.check_length(
                    sample if split == "train" else replace(question(sample), id=sample.id, origin=sample.origin)
                )
            except UserError as error:
                problems.append(str(error))
                left.add(name, split, TOO_LONG, str(error))
            else:
                kept[split][name].append(sample)
    if problems and not skip:
        raise DataError("\n".join([f"{len(problems)} samples cannot be used", *problems, SKIP]))
    return kept


def refuse_empty(planned: Plan, data: Path, samples: Samples, left: LeftOut) -> None:
    """Raises DataError where a task has no samples left."""
    for split, by_task in samples.items():
        for name in (name for name, listed in by_task.items() if not listed):
            task = planned.suite.task(name)
            raise formats.nothing_left(task, split, data / getattr(task, split), left)


def load_backbone(planned: Plan) -> Backbone:
    """The backbone on its device, at its precision. Raises UserError where a task needs images that it cannot write."""
    config, recipe = planned.config, planned.recipe
    packages.require(*packages.needed(config.backbone))
    backbone = backbones.load(config.backbone).load(
        planned.device,
        config.weights,
        dtype=DTYPES[recipe.precision],
        device_map=config.device_map,
        checkpointing=recipe.checkpointing,
        **loading_options(config.backbone, config.backbone_options),
    )
    require_finite(backbone, config.weights)
    backbone.seed = config.seed
    if any("image" in planned.suite.task(name).writes for name in [*planned.order, *planned.held_out]):
        backbone.require_drawing()
    return backbone


def require_finite(model: nn.Module, weights: Path | None) -> None:
    """Raises UserError where a parameter is infinite or not a number: every score would be that of noise."""
    for name, value in model.named_parameters():
        if not value.is_floating_point() or value.is_meta or value.sum(dtype=torch.float32).isfinite():
            continue
        if count := int((~value.isfinite()).sum()):  # or the sum alone is out of range
            raise UserError(
                f"{weights or 'embedded model'}: {count:,} of {value.numel():,} numbers of {name} are infinite or no "
                "number; copy the weights again, or give another --precision"
            )


def trained_beside(backbone: Backbone, trainable: str) -> dict[str, nn.Parameter]:
    """The backbone's parameters that are trained beside the method's, in float32, by name. trainable: see `Recipe`."""
    found = {} if trainable == "branches" else backbone.connections()
    if trainable == "released":
        found |= backbone.released_extras()
    return in_float32({f"backbone.{name}": parameter for name, parameter in found.items()})


def check_clip(planned: Plan, device: str) -> None:
    """Loads the CLIP model where a task writes images. Raises UserError where it is missing or no CLIP."""
    if any("image" in planned.suite.task(name).writes for name in [*planned.order, *planned.held_out]):
        if needs_open_clip(planned.suite.clip):
            packages.require("torchvision", "open_clip_torch")
        load_clip(planned.suite.clip, device)
