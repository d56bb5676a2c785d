"""Prototype: one LoRA per task as in mr-lora, chosen for a question by the nearest centroid of its frozen features.

Nothing is trained to choose. The centroid of a task is the mean of the pretrained model's hidden states over the text
of its first 100 training questions, each after its image, with the branches off. A question is answered with the branch
of the task, of those learnt, whose centroid is nearest to its features, in units of their deviation within tasks.
Counts, sums and summed squares are kept, and no sample. How separable the tasks of a suite are without training is what
`cnext analyze --what validity` shows.

Reference: the project's own baseline; branches as in Zhao et al., MLLM-CL, arXiv 2506.05453; centroids as in Rebuffi et
al., iCaRL, arXiv 1611.07725, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnext import adapters
from cnext.adapters.by_question import ByCentroid
from cnext.distributed import collectives
from cnext.methods.base import Card
from cnext.methods.parts.branches import TaskBranches
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

QUESTIONS = 100
"""Questions of each task that its centroid is the mean of."""


@dataclass
class Prototype(TaskBranches):
    """y = W x + scale * B_t A_t x, t the task whose centroid is nearest to the question's features."""

    scale: float = 3.0
    lr_factor: float = 2.0

    card = Card(
        "own; arXiv 2506.05453, 1611.07725",
        "all branches, a centroid of features per task and their variances",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        self.by_centroid = ByCentroid(len(tasks), self.backbone.question_features([]), QUESTIONS)

    def activate(self, count: int) -> None:
        """Activates the branch of the ``count``-th task alone."""
        self.active = list(self.branch_of.values())[:count]
        adapters.activate(self.model, self.active[-1:])

    def before_step(self, batch: Sequence[Any]) -> None:
        task = len(self.active) - 1
        if self.by_centroid.wants(task):
            self.by_centroid.add(task, collectives.all_gather(self.features(batch)))

    def features(self, encoded: Sequence[Any]) -> Tensor:
        """The pretrained model's features of the questions, (N, hidden)."""
        with adapters.activated(self.model, ()):
            return self.backbone.question_means(encoded)

    def route(self, questions: Sequence[Sample]) -> list[str]:
        """The branch of the nearest task for each question, of the tasks learnt; the first before any is."""
        nearest = self.by_centroid.nearest(self.features(self.backbone.encode(questions)))
        return [list(self.branch_of.values())[index] for index in nearest.tolist()]

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        return self.answer_with_branches([(branch,) for branch in self.route(questions)], questions, max_new_tokens)

    def extra_bytes(self, tasks: int) -> int:
        return super().extra_bytes(tasks) + sum(8 * tensor.numel() for tensor in self.by_centroid.state().values())

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.by_centroid.state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.by_centroid.load(state)
