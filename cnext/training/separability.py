"""How separable a suite's tasks are without training: a nearest-centroid router on the pretrained model's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnext import adapters
from cnext.adapters.by_question import ByCentroid
from cnext.backbones.base import Backbone
from cnext.distributed import collectives
from cnext.tasks.base import Sample, Task
from cnext.training.batches import stable_seed
from cnext.training.evaluation import question

SAMPLES = 100
"""Samples of each task that its centroid is the mean of, and most that are then assigned."""
AT_ONCE = 50
INPUTS = {"question": False, "image_and_question": True}
"""What the router sees, and whether an image is in it."""


def separability(
    backbone: Backbone,
    tasks: Sequence[Task],
    samples: Mapping[str, Mapping[str, Sequence[Sample]]],
    split: str,
    uneven: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """The content of separability.json, see `cnext.runs.schemas.Separability`.

    Centroids are of training samples, and samples of ``split`` are assigned; both are drawn by a fixed seed. The router
    sees what a model sees of a test sample (`question`), in one case without the image and other media. A task that
    reads none is then assigned by its question in both cases. It depends on suite, data and backbone alone: branches
    are off. Every process takes its share of the samples; uneven: as `processes.sharded` returns it.
    """
    drawn = {part: [_drawn(samples[part][task.name], task.name, part) for task in tasks] for part in ("train", split)}
    found: dict[str, Any] = {"tasks": [task.name for task in tasks], "split": split}
    found["centroids"] = [len(of) for of in drawn["train"]]
    for name, images in INPUTS.items():
        with uneven(), adapters.activated(backbone.language_model, ()):
            own = {part: [_features(backbone, of, images) for of in listed] for part, listed in drawn.items()}
        features = {part: list(map(collectives.all_gather, of)) for part, of in own.items()}
        router = ByCentroid(len(tasks), features["train"][0], SAMPLES)
        for number, x in enumerate(features["train"]):
            router.add(number, x)
        confusion = [torch.bincount(router.nearest(x), minlength=len(tasks)).tolist() for x in features[split]]
        right = sum(row[number] for number, row in enumerate(confusion))
        found[name] = {"accuracy": 100 * right / sum(map(sum, confusion)), "confusion": confusion}
    return found


def _drawn(samples: Sequence[Sample], task: str, part: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(stable_seed(0, task, f"separability/{part}"))
    return [samples[index] for index in torch.randperm(len(samples), generator=generator)[:SAMPLES].tolist()]


def _features(backbone: Backbone, drawn: Sequence[Sample], images: bool) -> Tensor:
    """Features of this process's share of some samples' questions, (N, width)."""
    asked = [question(sample) for sample in collectives.shard(drawn)]
    asked = asked if images else [replace(one, image=None, media={}) for one in asked]
    parts = [backbone.question_means([])]
    for start in range(0, len(asked), AT_ONCE):
        parts.append(backbone.question_means(backbone.encode(asked[start : start + AT_ONCE])))
    return torch.cat(parts)
