"""MAGE-experts: MAGE with one expert per task, chosen by the question; the general branches are pulled and merged.

MAGE's text expert is shared by all tasks that write text, and most of what is forgotten is the form of the answer. Here
each task has an expert of its own; the general branches, of the same rank, are regularized as in mage-pull. The task of
a test question is not given: a linear discriminant on the pretrained model's hidden state at the question's end finds
the most likely one. It is fitted to each task's first questions during training; no sample is kept, and later tasks do
not invalidate it, because the pretrained model does not change. Other tasks' experts do not take part in the answer.

Reference: the project's own, after Continual-NExT, arXiv 2602.18055; Hayes and Kanan, Deep SLDA, arXiv 1909.01520.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters.by_question import ByQuestion
from cnext.distributed import collectives
from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches
from cnext.methods.parts.penalties import pull_to_start
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

QUESTIONS = 400
"""Questions of each task that the discriminant is fitted to."""


@dataclass
class MageExperts(RoleBranches):
    """y = W x + scale * (sum over the general branches of B_i A_i + B_k A_k) x, k the question's most likely task."""

    rank: Annotated[int, "Total rank, shared evenly by two general branches and one expert per task."] = 32
    scale: Annotated[
        float,
        "Scaling factor of the branches' output: with six tasks three eighths of the rank take part in an answer.",
    ] = 6.0
    c: Annotated[float, "Plasticity of the merge, see mage-paper."] = 20.0
    pull: Annotated[float, "Weight of the penalty towards the task's start, see mage-pull."] = 0.36

    sides = ("general",)
    by_task = True
    card = Card(
        "own; arXiv 2602.18055, 1909.01520",
        keeps="summed Fisher information, moments of question features",
        grid={"scale": (1.0, 3.0, 6.0), "pull": (0.003, 0.01, 0.03, 0.1)},
        grows={"pull": 2},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regularizer = pull_to_start(self.rule, self.pull)

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        names = [*self.general_branches, *self.experts.values()]
        return {name: (self.rank + index) // len(names) for index, name in enumerate(names)}

    def trained_branches(self, task: Task) -> Iterable[str]:
        return [*super().trained_branches(task), self.experts[task.name]]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.experts = {task.name: f"expert-{number}" for number, task in enumerate(tasks, 1)}
        super().attach(tasks, generator)
        self.by_question = ByQuestion(len(tasks), self.backbone.question_features([]), QUESTIONS)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.task_index = list(self.experts).index(task.name)
        adapters.activate(self.model, [*self.general_branches, self.experts[task.name]])
        return super().trainable(task)

    def before_step(self, batch: Sequence[Any]) -> None:
        super().before_step(batch)
        if self.by_question.wants(self.task_index):
            self.by_question.add(self.task_index, collectives.all_gather(self.features(batch)))

    def features(self, encoded: Sequence[Any]) -> Tensor:
        """The pretrained model's features of the questions, (N, hidden)."""
        with adapters.activated(self.model, ()):
            return self.backbone.question_features(encoded)

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        likeliest = self.by_question.likeliest(self.features(self.backbone.encode(questions)))
        experts = list(self.experts.values())
        active = [(*self.general_branches, experts[index]) for index in likeliest.tolist()]
        return self.answer_with_branches(active, questions, max_new_tokens)

    def extra_bytes(self, tasks: int) -> int:
        return super().extra_bytes(tasks) + sum(8 * tensor.numel() for tensor in self.by_question.state().values())

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.by_question.state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.by_question.load(state)
