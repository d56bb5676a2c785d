"""Prompt pool: learnt vectors before the question, of those prompts whose keys are nearest to it (L2P). No LoRA.

With q the frozen model's features at the end of a question, the top_k prompts by cos(q, key) go before its input, in
the pool's order, and L = L_task + pull * mean over the batch of the sum over the chosen of 1 - cos(q, key): prompts
learn from the task, keys from the questions. The pool is the largest with no more parameters than LoRA of rank 32.

Reference: Wang et al., Learning to Prompt for Continual Learning, arXiv 2112.08654.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnext.adapters.prompts import Prompts
from cnext.errors import UserError
from cnext.methods.base import Card, Method, answered_in_groups
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task


@dataclass
class PromptPool(Method):
    """y = model(prompts nearest to the question, question)."""

    length: int = 8
    """Vectors in a prompt."""
    top_k: int = 2
    """Prompts that a question gets."""
    pull: float = 0.5
    """Weight of the chosen keys' pull towards the questions."""
    scale: float = 100.0
    """Prompts are this times their parameters: the published learning rate, 0.03, at the suite's of 0.001."""

    card = Card("arXiv 2112.08654")

    def __post_init__(self) -> None:
        if min(self.length, self.top_k) < 1 or not 0 < self.scale < float("inf") or not 0 <= self.pull < float("inf"):
            raise UserError(f"expected length and top_k from 1, finite scale above 0 and pull from 0, got {self}")
        self.trained = torch.tensor(False)

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        linears: list[Any] = [m for n, m in self.model.named_modules() if n.rpartition(".")[2] in self.backbone.targets]
        budget = 32 * sum(linear.in_features + linear.out_features for linear in linears)
        self.backbone.requires_grad_(False)
        self.pool = Prompts(self.model, budget, self.length, self.top_k, self.scale, generator)

    def held(self) -> dict[str, nn.Parameter]:
        return dict(self.pool.named_parameters())

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.trained = torch.tensor(True)
        return self.held()

    def before_step(self, batch: Sequence[Any]) -> None:
        self.pool.chosen, self.cosines = self.pool.nearest(self.backbone.question_features(batch))

    def extra_loss(self, batch: Sequence[Any]) -> Tensor:
        self.pool.chosen = None  # the batch is through
        return self.pull * (1 - self.cosines).sum(1).mean()

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        def told(chosen: tuple[int, ...], places: list[int]) -> list[Prediction]:
            with self.pool.before(torch.tensor([chosen])):
                return self.backbone.generate([questions[place] for place in places], max_new_tokens)

        if not self.trained:
            return super().answer(questions, max_new_tokens, task)
        chosen, _ = self.pool.nearest(self.backbone.question_features(self.backbone.encode(questions)))
        return answered_in_groups(list(map(tuple, chosen.tolist())), told)

    def state_dict(self) -> dict[str, Tensor]:
        return {"trained": self.trained}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.trained = state["trained"]
