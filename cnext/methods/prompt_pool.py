"""Prompt pool: soft prompts before the question, selected by the similarity of their keys to it (L2P). No LoRA.

With q the frozen model's features at the end of a question, the top_k prompts by cos(q, key) are prepended to its
input, in the pool's order, and L = L_task + pull * mean over the batch of the sum over selected prompts of
1 - cos(q, key): prompts learn from the task, keys from the questions. The pool is the largest with at most the
parameters of LoRA of rank 32.

Reference: Wang et al., Learning to Prompt for Continual Learning, arXiv 2112.08654.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cnext.adapters.prompts import Prompts
from cnext.errors import UserError
from cnext.methods.base import Card, Method, answer_in_groups, check_lr_factor
from cnext.methods.parts.branches import total_width
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task


@dataclass
class PromptPool(Method):
    """y = model(prompts nearest to the question, question)."""

    length: Annotated[int, "Vectors per prompt."] = 8
    top_k: Annotated[int, "Prompts selected per question."] = 2
    pull: Annotated[float, "Weight of the loss that pulls the selected keys towards the questions."] = 0.5
    scale: Annotated[
        float, "Factor of the prompts over their parameters: the published learning rate is 0.03, the suite's 0.001."
    ] = 100.0

    lr_factor: Annotated[float, "Factor of the recipe's learning rate."] = 0.5

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"length": (1, 16384), "top_k": (1, 1024)}
    card = Card("arXiv 2112.08654", grid={"scale": (10.0, 30.0, 100.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)})

    def __post_init__(self) -> None:
        if min(self.length, self.top_k) < 1 or not 0 < self.scale < float("inf") or not 0 <= self.pull < float("inf"):
            raise UserError(
                f"expected length and top_k of at least 1, a finite scale above 0 and a finite pull from 0, got {self}"
            )
        check_lr_factor(self.lr_factor)
        self.trained = torch.tensor(False)

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        budget = 32 * total_width(self.model, self.backbone.targets)
        self.backbone.requires_grad_(False)
        self.pool = Prompts(self.model, budget, self.length, self.top_k, self.scale, generator)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.pool.named_parameters())

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.trained = torch.tensor(True)
        return self.adapter_parameters()

    def before_step(self, batch: Sequence[Any]) -> None:
        self.pool.chosen, self.cosines = self.pool.nearest(self.backbone.question_features(batch))

    def extra_loss(self, batch: Sequence[Any]) -> Tensor:
        self.pool.chosen = None  # the batch's forward pass is done
        return self.pull * (1 - self.cosines).sum(1).mean()

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        def generate(chosen: tuple[int, ...], indices: list[int]) -> list[Prediction]:
            with self.pool.before(torch.tensor([chosen])):
                return self.backbone.generate([questions[index] for index in indices], max_new_tokens)

        if not self.trained:
            return super().answer(questions, max_new_tokens, task)
        chosen, _ = self.pool.nearest(self.backbone.question_features(self.backbone.encode(questions)))
        return answer_in_groups(list(map(tuple, chosen.tolist())), generate)

    def state_dict(self) -> dict[str, Tensor]:
        return {"trained": self.trained}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.trained = state["trained"]
