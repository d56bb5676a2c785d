"""MR-LoRA: one LoRA per task, trained independently, and a router LoRA that predicts a question's task as a letter.

After every task the router is trained, on samples kept of all tasks so far, to answer "<instruction> Name the letter of
the task."; it sees only the first instruction and its image. A question is routed to the task, of those learnt, whose
letter has the largest logit. (In the paper the prompt describes every task, and the choice is random where the router
writes no letter.)

Reference: Zhao et al., MLLM-CL, arXiv 2506.05453.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase as letters
from typing import Annotated

from torch import nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card, Memory, Phase
from cnext.methods.parts.branches import TaskBranches
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task, Turn

BATCH = 16
"""Most samples in a batch of the router's training."""


def routing_sample(sample: Sample, task: int = 0) -> Sample:
    """The router's input for a sample, with the letter of its task as the answer."""
    turn = Turn(f"{sample.turns[0].instruction} Name the letter of the task.", letters[task])
    return Sample("", (turn,), image=sample.image, media=sample.media)


@dataclass
class MrLora(TaskBranches):
    """y = W x + scale * B_t A_t x, t the task that the router predicts."""

    scale: float = 3.0
    samples: Annotated[int, "Training samples kept of every task, for the router."] = 20
    router_steps: Annotated[
        int, "Steps of the router after every task: learning rate 0.002, batches of up to 16 samples of all tasks."
    ] = 80
    oracle: Annotated[bool, "Use the branch of the question's true task, as a perfect router would."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.samples, self.router_steps) < 1:
            raise UserError(
                f"mr-lora: samples and router_steps must be at least 1, got {self.samples} and {self.router_steps}"
            )

    @property
    def card(self) -> Card:
        return Card(
            "arXiv 2506.05453",
            "all branches, a router",
            0 if self.oracle else self.samples,
            self.oracle,
            grid={"scale": (1.0, 3.0, 6.0), "router_steps": (20, 40, 80, 160)},
        )

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        if len(tasks) > len(letters):
            raise UserError(f"mr-lora: expected at most {len(letters)} tasks, one per letter, got {len(tasks)}")
        return super().branches(tasks) | {"router": self.rank}

    def activate(self, count: int) -> None:
        """Activates the branch of the ``count``-th task alone."""
        self.active = list(self.branch_of.values())[:count]
        adapters.activate(self.model, self.active[-1:])

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        samples = [routing_sample(sample, task) for task, kept in enumerate(memory.values()) for sample in kept]
        self.memory = self.backbone.encode(samples)

    def phases(self) -> Iterator[Phase]:
        """The router's training, on every ``stride``-th sample of the memory per step, so that tasks are mixed."""
        if not self.memory:
            return
        stride = -(-len(self.memory) // BATCH)
        router = list(adapters.branch_parameters(self.model, ["router"]).values())
        with adapters.activated(self.model, ["router"]):
            yield Phase(
                router, self.router_steps, 0.002, lambda n: self.backbone.loss(self.memory[n % stride :: stride]).total
            )

    def route(self, questions: Sequence[Sample]) -> list[str]:
        """The branch that the router chooses for each question, of the tasks learnt; the first before any is."""
        with adapters.activated(self.model, ["router"]):
            samples = [routing_sample(question) for question in questions]
            logits = self.backbone.choice_logits(samples, letters[: len(self.active) or 1])
        return [list(self.branch_of.values())[index] for index in logits.argmax(-1).tolist()]

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        branches = [self.branch_of[task.name]] * len(questions) if self.oracle and task else self.route(questions)
        return self.answer_with_branches([(branch,) for branch in branches], questions, max_new_tokens)
