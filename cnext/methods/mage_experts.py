"""MAGE-experts: MAGE with an expert for every task, found by the question; the general branches are pulled and merged.

MAGE's text expert is shared by every task that writes text, an expert in name only, and most of what is forgotten is
the form of the answer. Here each task alone trains its expert; the general branches, of the same rank, are held as in
mage-pull. Nobody says which task a question is of: a linear discriminant finds the likeliest from the pretrained
model's hidden state at the question's end, fitted to each task's first questions as they pass: no sample is kept, and
the fit stays true, for that model does not change. Other tasks' experts are out of the forward pass.

Reference: the project's own, after Continual-NExT, arXiv 2602.18055; Hayes and Kanan, Deep SLDA, arXiv 1909.01520.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters import BRANCH_ROLES, roles_of
from cnext.adapters.by_question import ByQuestion
from cnext.distributed import collectives
from cnext.methods.base import Card
from cnext.methods.mage_pull import MagePull
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

GENERAL = [role.name for role in BRANCH_ROLES if role.side == "general"]
QUESTIONS = 400  # of a task, that the discriminant is fitted to


@dataclass
class MageExperts(MagePull):
    """y = W x + scale * (sum over the general branches of B_i A_i + B_k A_k) x, k the question's likeliest task."""

    rank: int = 32
    """Rank in all, shared evenly by two general branches and an expert for every task."""
    scale: float = 6.0
    """Factor of the branches: of six tasks' rank three eighths take part in an answer."""

    card = Card("own; arXiv 2602.18055, 1909.01520", keeps="summed Fisher information, moments of question features")

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.experts = {task.name: f"expert-{number}" for number, task in enumerate(tasks, 1)}
        names = [*GENERAL, *self.experts.values()]
        self.attach_branches({name: (self.rank + i) // len(names) for i, name in enumerate(names)}, generator)
        self.by_question = ByQuestion(len(tasks), self.backbone.question_features([]), QUESTIONS)

    def roles(self, task: Task) -> list[str]:
        return [*(role.name for role in roles_of(task.reads, ())), self.experts[task.name]]

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.number = list(self.experts).index(task.name)
        adapters.activate(self.model, [*GENERAL, self.experts[task.name]])
        return super().trainable(task)

    def before_step(self, batch: Sequence[Any]) -> None:
        if self.by_question.wants(self.number):
            self.by_question.add(self.number, collectives.all_gather(self.features(batch)))

    def features(self, encoded: Sequence[Any]) -> Tensor:
        """What the pretrained model makes of the questions, (N, hidden)."""
        with adapters.activated(self.model, ()):
            return self.backbone.question_features(encoded)

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        likeliest = self.by_question.likeliest(self.features(self.backbone.encode(questions)))
        experts = list(self.experts.values())
        return self.answer_with([(*GENERAL, experts[n]) for n in likeliest.tolist()], questions, max_new_tokens)

    def extra_bytes(self, tasks: int) -> int:
        return super().extra_bytes(tasks) + sum(8 * tensor.numel() for tensor in self.by_question.state().values())

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.by_question.state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.by_question.load(state)
