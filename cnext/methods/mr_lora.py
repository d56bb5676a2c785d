"""MR-LoRA: a LoRA for every task, trained alone, and a router LoRA that names the letter of a question's task.

After every task the router trains on, on samples kept of all tasks seen, to answer "<instruction> Name the letter of
the task."; it sees a first instruction and its image alone. A question goes to the task seen whose letter has the
largest logit. (In the paper the prompt describes every task, and chance chooses where the router writes no letter.)
Reference: Zhao et al., MLLM-CL, arXiv 2506.05453.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase as letters

import torch

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card, Memory, TaskBranches
from cnext.methods.lora import Lora
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task, Turn


def asked(sample: Sample, task: int = 0) -> Sample:
    """What the router sees of a sample, and the letter of its task."""
    turn = Turn(f"{sample.turns[0].instruction} Name the letter of the task.", letters[task])
    return Sample("", (turn,), image=sample.image)


@dataclass
class MrLora(TaskBranches, Lora):
    """y = W x + scale * B_t A_t x, with t the task that the router names; rank is that of each branch."""

    samples: int = 20
    """Training samples kept of every task, for the router."""
    router_steps: int = 40
    """Steps of the router after every task, at a learning rate of 0.002, on batches of up to 16 from all tasks."""
    oracle: bool = False
    """Takes the branch of the question's own task: what a perfect router would reach."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.samples, self.router_steps) < 1:
            raise UserError(f"mr-lora: samples and router_steps start at 1, got {self.samples} and {self.router_steps}")

    @property
    def card(self) -> Card:
        return Card("arXiv 2506.05453", "all branches, a router", 0 if self.oracle else self.samples, self.oracle)

    def attach_branches(self, ranks: dict[str, int], generator: torch.Generator) -> None:
        if len(ranks) > len(letters):
            raise UserError(f"mr-lora: expected at most {len(letters)} tasks, one a letter, got {len(ranks)}")
        super().attach_branches({**ranks, "router": self.rank}, generator)

    def activate(self, count: int) -> None:
        self.active = list(self.branches.values())[:count]
        adapters.activate(self.model, self.active[-1:])

    def before_task(self, parameters: dict[str, torch.nn.Parameter], steps: int, memory: Memory) -> None:
        self.memory = self.backbone.encode([asked(s, n) for n, kept in enumerate(memory.values()) for s in kept])

    def after_task(self) -> None:
        router = [p.requires_grad_() for p in adapters.branch_parameters(self.model, ["router"]).values()]
        optimizer, stride = torch.optim.AdamW(router, 0.002, weight_decay=0.0), -(-len(self.memory) // 16)
        with adapters.activated(self.model, ["router"]):
            for step in range(self.router_steps if stride else 0):
                self.backbone.loss(self.memory[step % stride :: stride]).total.backward()
                optimizer.step()
                optimizer.zero_grad()

    def route(self, questions: Sequence[Sample]) -> list[str]:
        """The branch that the router chooses for each question, of the tasks seen (at first an untrained one)."""
        with adapters.activated(self.model, ["router"]):
            logits = self.backbone.choice_logits([asked(s) for s in questions], letters[: len(self.active) or 1])
        return [list(self.branches.values())[number] for number in logits.argmax(-1).tolist()]

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        branches = [self.branches[task.name]] * len(questions) if self.oracle and task else self.route(questions)
        return self.answer_with([(branch,) for branch in branches], questions, max_new_tokens)
