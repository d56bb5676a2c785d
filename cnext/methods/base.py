"""The interface of a continual-learning method: one dataclass of hyperparameters with hooks around training.

Once: ``attach``. For every task: ``trainable`` and ``before_task``; per step ``before_step``, the backward pass of the
task loss, ``transform_gradients``, the gradients of ``extra_loss`` added, clipping, the optimizer, ``after_step``; then
``after_task``. Evaluation is inside ``for_eval``, by ``answer``. A hook that a method does not need is not written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.averaging import MovingAverage
from cnext.backbones.base import Backbone
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

Memory = Mapping[str, Sequence[Sample]]
"""Training samples kept of each task learnt so far and of the present one, in the order learnt."""


@dataclass(frozen=True)
class Card:
    """What a method needs. The runner gives it that and no more, and the contract test holds it to the rest.

    paper: where it comes from.  keeps: what it stores between tasks besides the adapter that it trains.
    rehearsal: training samples that it keeps of every task (0: rehearsal-free).
    task_id_at_test: whether it is told which task a question belongs to.
    """

    paper: str
    keeps: str = "nothing"
    rehearsal: int = 0
    task_id_at_test: bool = False


class Method(ABC):
    """A subclass is a dataclass whose fields are its hyperparameters; each becomes a flag of ``cnext-run``.

    ``backbone`` is the model, ``model`` its language model, which carries the adapters.
    """

    joint: ClassVar[bool] = False
    """Whether all tasks are learnt at once, as a reference, and not one after another."""

    card: ClassVar[Card]
    """What the method needs."""

    def setup(self, backbone: Backbone, tasks: Sequence[Task], generator: torch.Generator) -> None:
        """Binds the method to a backbone. Called once, before the first task."""
        self.backbone, self.model = backbone, backbone.language_model
        self.attach(tasks, generator)

    @abstractmethod
    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        """Attaches adapters to ``self.model``. tasks: those to come, in order; only their number and names count."""

    @abstractmethod
    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        """Makes exactly this task's parameters trainable and returns them by name; empty: the task is not trained."""

    def held(self) -> dict[str, nn.Parameter]:
        """Every parameter that the method has put into the model, by name: what a checkpoint holds."""
        return adapters.adapter_parameters(self.model)

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        """The task's parameters are about to be trained for ``steps`` optimizer steps.

        memory: as many samples of each task as the card asks for; empty for a rehearsal-free method.
        """

    def before_step(self, batch: Sequence[Any]) -> None:
        """The encoded samples are about to go through the model."""

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Reads or changes ``.grad``, which holds the task loss's gradient: not clipped, no penalty in it."""

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        """A penalty to add to the task loss, or None. batch: the step's encoded samples."""
        return None

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def after_task(self) -> dict[str, Any] | None:
        """The task's last step is done. Returns statistics for the results, or None."""
        return None

    @contextmanager
    def for_eval(self) -> Iterator[None]:
        """The model inside is the one to evaluate."""
        yield

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        """Answers questions, which hold an instruction and perhaps an image. task: None unless the card asks for it."""
        return self.backbone.generate(questions, max_new_tokens)

    def answer_with(
        self, branches: Sequence[tuple[str, ...]], questions: Sequence[Sample], max_new_tokens: int
    ) -> list[Prediction]:
        """Answers each question with exactly its branches active, questions of the same branches together."""

        def told(active: tuple[str, ...], places: list[int]) -> list[Prediction]:
            with adapters.activated(self.model, active):
                return self.backbone.generate([questions[place] for place in places], max_new_tokens)

        return answered_in_groups(branches, told)

    def extra_bytes(self, tasks: int) -> int:
        """An upper bound of what is kept after ``tasks`` tasks beyond one adapter of rank 32, samples aside."""
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        """What the method needs to go on after an interruption, besides the parameters `held`."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state, f"{type(self).__name__} has no state, got {sorted(state)}"


def answered_in_groups(
    keys: Sequence[Hashable], answer: Callable[[Any, list[int]], list[Prediction]]
) -> list[Prediction]:
    """One answer for each key, in their order. answer: gives those of a key's places, asked for together."""
    answers: dict[int, Prediction] = {}
    for key in dict.fromkeys(keys):
        places = [place for place, other in enumerate(keys) if other == key]
        answers |= zip(places, answer(key, places), strict=True)
    return [answers[place] for place in range(len(keys))]


class Averaged(Method):
    """A method whose trained parameters go through a moving average, ``rule``, which the subclass makes."""

    rule: MovingAverage

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.rule.begin_task(parameters, steps)

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        self.rule.update()

    def after_task(self) -> dict[str, Any] | None:
        self.rule.end_task()

    def state_dict(self) -> dict[str, Tensor]:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.rule.load_state_dict(state)


class TaskBranches(Method):
    """One branch for every task, before `Lora` among the bases: the present one is trained, those learnt are frozen.

    The learnt ones add to y like a W into which each had been merged at its task's end, and W stays as it is. Those of
    later tasks are off. After a ``load_state_dict`` as many are on as when the state was saved.
    """

    rank: int
    attach_branches: Callable[[dict[str, int], torch.Generator], None]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.branches = {task.name: f"task-{number}" for number, task in enumerate(tasks, 1)}
        self.attach_branches(dict.fromkeys(self.branches.values(), self.rank), generator)
        self.activate(0)

    def activate(self, count: int) -> None:
        """Lets the first ``count`` branches take part."""
        self.active = list(self.branches.values())[:count]
        adapters.activate(self.model, self.active)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.activate(list(self.branches).index(task.name) + 1)
        return adapters.set_trainable(self.model, self.active[-1:])

    def extra_bytes(self, tasks: int) -> int:
        """All branches but one, and their count."""
        one = adapters.branch_parameters(self.model, [*self.branches.values()][:1])
        return sum(4 * p.numel() for p in self.held().values()) - sum(4 * p.numel() for p in one.values()) + 8

    def state_dict(self) -> dict[str, Tensor]:
        return {"active": torch.tensor(len(self.active))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.activate(int(state["active"]))
