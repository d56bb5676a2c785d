"""The stages of a run: what each trains, how many steps it takes, and which samples are kept for rehearsal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cnext import methods
from cnext.config.plan import Plan
from cnext.tasks.base import Sample, Task, joined
from cnext.training.batches import stable_seed


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        number: tasks learnt at its end. 0, which has no Stage, is the pretrained model.
        task: as the method sees it; all tasks as one for joint training.
        names: the tasks whose samples are trained on.
        steps: optimizer steps.
    """

    number: int
    task: Task
    names: tuple[str, ...]
    steps: int

    @property
    def label(self) -> str:
        """Name of its checkpoint, as "2_ImageNet"."""
        return f"{self.number}_{self.task.name}"


def stages(planned: Plan) -> list[Stage]:
    """The stages of a run in order: one per task, or a single one of all tasks where the method trains jointly."""
    tasks = [planned.suite.task(name) for name in planned.order]
    if methods.load(planned.config.method).joint:
        trained = [(len(tasks), joined(tasks), planned.order)]
    else:
        trained = [(number, task, (task.name,)) for number, task in enumerate(tasks, 1)]
    return [
        Stage(number, task, names, sum(planned.recipe.of(task.name).steps[name] for name in names))
        for number, task, names in trained
    ]


def rehearsal_memory(
    train: Mapping[str, Sequence[Sample]], tasks: Sequence[str], count: int, seed: int
) -> dict[str, list[Sample]]:
    """The samples kept of each task for rehearsal, drawn by the seed; {} for a count of 0.

    Args:
        train: training samples by task.
        tasks: names of the tasks seen, the present one included.
        count: samples of each, as `Card.rehearsal` says; a task with fewer gives all.
    """
    kept = {}
    for name in tasks if count else ():
        generator = torch.Generator().manual_seed(stable_seed(seed, name, "memory"))
        chosen = torch.randperm(len(train[name]), generator=generator)[:count]
        kept[name] = [train[name][index] for index in chosen.tolist()]
    return kept
