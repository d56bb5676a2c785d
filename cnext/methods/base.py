"""The interface of a continual-learning method: a dataclass of hyperparameters with hooks around training."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.averaging import MovingAverage
from cnext.backbones.base import Backbone
from cnext.errors import UserError, check_range
from cnext.scoring.base import Prediction
from cnext.tasks.base import Sample, Task

RANGE, SMALLEST = (-1e6, 1e6), 1e-9
"""The least and the greatest value of a hyperparameter, unless its method says others, and the smallest that is not 0:
beyond them a product of two is not exact in float32, or nothing."""
Memory = Mapping[str, Sequence[Sample]]
"""Training samples kept for rehearsal: task name to samples, earlier tasks and the current one, in training order."""


@dataclass(frozen=True)
class Card:
    """What a method needs. The runner gives it that and no more.

    Attributes:
        paper: where the method comes from.
        keeps: what it stores between tasks besides the adapter that it trains.
        rehearsal: training samples kept of every task; 0 for a rehearsal-free method.
        task_id_at_test: whether it is given the task of a test question.
        grid: hyperparameters that `bench/tune.py` tunes, and the values that it combines: about twelve combinations.
        grows: of these, the ones whose values are multiplied by ``scale`` to a power, and the power.
    """

    paper: str
    keeps: str = "nothing"
    rehearsal: int = 0
    task_id_at_test: bool = False
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    grows: Mapping[str, int] = field(default_factory=dict)

    def settings(self) -> list[dict[str, float]]:
        """Every combination of the grid's values, by hyperparameter; the first hyperparameter varies slowest."""
        combined = (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))
        return [
            {n: value * each["scale"] ** self.grows[n] if n in self.grows else value for n, value in each.items()}
            for each in combined
        ]


@dataclass(frozen=True)
class Phase:
    """Additional training after a task's last step, run by the trainer: AdamW, constant rate, no weight decay.

    Attributes:
        parameters: the parameters to train.
        steps: optimizer steps.
        learning_rate: of every step.
        loss: maps the step's number, from 0, to a scalar loss. Under data parallelism every process computes the same.
    """

    parameters: Sequence[nn.Parameter]
    steps: int
    learning_rate: float
    loss: Callable[[int], Tensor]


class Method(ABC):
    """Base class of methods. A subclass is a dataclass; each of its fields is a hyperparameter and a command-line flag.

    The trainer calls the hooks in this order::

        method.setup(backbone, tasks, generator)              # once; calls attach
        for task in tasks:
            parameters = method.trainable(task)
            method.before_task(parameters, steps, memory)
            for step in range(steps):
                for batch in micro_batches:
                    method.before_step(batch)
                    backbone.loss(batch).total.backward()
                    penalty = method.extra_loss(batch)        # its gradient is kept apart until transform_gradients
                    method.after_micro_batch(last=False)      # of all but the last
                method.transform_gradients(parameters)
                optimizer.step()                              # after adding the penalty's gradient, and clipping
                method.after_micro_batch(last=True)
                method.after_step()
            for phase in method.phases(): train(phase)
            method.after_task()
            with method.for_eval():
                predictions = method.answer(questions, max_new_tokens, None)

    A moving average of the parameters (``rule``) and a penalty on them (``regularizer``), set in ``__post_init__``, are
    run by the default hooks; a method that overrides one of these hooks calls ``super()``. A method is a few lines::

        @dataclass
        class LoraEma(Lora):
            retention: Annotated[float, "Weight of a task's starting values at its end."] = 0.13

            card = Card("arXiv 2106.09685, with an exponential moving average")

            def __post_init__(self):
                super().__post_init__()
                self.rule = Constant(self.retention)

    ``self.backbone`` is the model and ``self.model`` its language model, which carries the adapters.
    """

    card: ClassVar[Card]
    """What the method needs."""

    joint: ClassVar[bool] = False
    """Whether all tasks are trained at once, as a reference, instead of one after another."""

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = MappingProxyType({})
    """The least and the greatest value of hyperparameters that have others than `RANGE`; a subclass names more."""

    by_task: ClassVar[bool] = False
    """Whether parts of what it stores belong to the tasks by their place in the order, as a branch for each."""

    lr_factor: float = 1.0
    """Factor of the recipe's learning rate; a hyperparameter of methods that train."""

    relative_rate: float = 1.0
    """Learning rate of the step to come, over the recipe's; the trainer sets it before `transform_gradients`."""

    micro_batches: int = 1
    """Micro-batches of an optimizer step; the trainer sets it before `before_task`."""

    batch_samples: Sequence[Sample] = ()
    """The samples of the forward pass to come, in the order of its batch; the trainer sets it before `before_step`."""

    uneven: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context for generating answers while training, of which processes need different numbers of passes through a
    model that may be sharded; the runner sets it."""

    modalities: tuple[str, ...] = adapters.MODALITIES
    """What the suite's tasks may read and write; set by `setup`."""

    rule: MovingAverage | None = None
    """Moving average of the trained parameters: opened before each task, updated at each step, applied at its end."""

    observed: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Parameters that the task does not train and whose gradients `transform_gradients` reads, where they require one.
    They are summed over processes as the others are, and dropped before the optimizer's step."""

    regularizer: Callable[[], Tensor | None] | None = None
    """Penalty on the trained parameters, a scalar that every step adds to the task loss; None in a step without one."""

    @classmethod
    def idle(cls, given: Mapping[str, Any]) -> Collection[str]:
        """Hyperparameters that have no effect beside the given ones. A preset's value for one is left out."""
        return ()

    def setup(
        self,
        backbone: Backbone,
        tasks: Sequence[Task],
        generator: torch.Generator,
        modalities: Sequence[str] = adapters.MODALITIES,
    ) -> None:
        """Binds the method to a backbone. Called once, before the first task.

        Args:
            tasks, generator: see `attach`.
            modalities: those of the suite.
        """
        self.backbone, self.model = backbone, backbone.language_model
        self.modalities = adapters.check_modalities(modalities)
        self.attach(tasks, generator)

    @abstractmethod
    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        """Attaches adapters to ``self.model`` and freezes everything else.

        Args:
            tasks: the tasks to come, in training order. A method may use their number and names only.
            generator: CPU generator of the initial values.
        """

    @abstractmethod
    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        """Unfreezes the parameters that a task trains, freezes all others, and returns the former by name.

        Called once per task, before `before_task`. An empty result means that the task is not trained.
        """

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters that the method added to the model, trained or frozen, by name. Checkpoints store them."""
        return adapters.adapter_parameters(self.model)

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        """Called before a task's first step, and again with the same arguments when a run resumes within the task.

        Args:
            parameters: what `trainable` returned.
            steps: optimizer steps of the task.
            memory: as many samples of each task as the card asks for; empty for a rehearsal-free method.
        """
        if self.rule:
            # Tasks of a method may train branches that no earlier one trained.
            updates = steps * self.micro_batches if self.rule.place == "micro-batch" else steps
            self.rule.begin_task(parameters, updates, untrained=True)

    def before_step(self, batch: Sequence[Any]) -> None:
        """Called before each forward pass of training. batch: encoded samples, as ``backbone.output`` takes them."""

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Reads or changes ``.grad``, which holds the gradient of the task loss: before clipping, without penalties.

        Called once per optimizer step, after gradients are summed over micro-batches and processes.
        """
        if self.rule and self.rule.place == "before optimizer":
            self.rule.update(rate=self.relative_rate)

    def after_micro_batch(self, last: bool) -> None:
        """Called after each micro-batch's backward pass, with the gradients summed so far in ``.grad``.

        last: whether it is the last of a step. It is then called after the optimizer's step, and the gradients are
            those that the optimizer had.
        """
        if self.rule and (self.rule.place == "micro-batch" or (last and self.rule.place == "after optimizer")):
            self.rule.update(rate=self.relative_rate)

    def extra_loss(self, batch: Sequence[Any]) -> Tensor | None:
        """A penalty to add to the task loss: a scalar, or None. batch: the encoded samples of the forward pass."""
        return self.regularizer() if self.regularizer else None

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def phases(self) -> Iterable[Phase]:
        """Additional training after the task's last step, in evaluation mode.

        As a generator, what it sets up before a ``yield`` is in place while the trainer runs that phase.
        """
        return ()

    def after_task(self) -> dict[str, Any] | None:
        """Called after a task's last step and `phases`. Returns statistics for results.json by branch, or None."""
        if self.rule:
            self.rule.end_task()

    @contextmanager
    def for_eval(self) -> Iterator[None]:
        """Context in which the model is the one to evaluate."""
        yield

    def answer(self, questions: Sequence[Sample], max_new_tokens: int, task: Task | None) -> list[Prediction]:
        """Generates an answer to each question, greedily.

        Args:
            questions: samples with an instruction and perhaps an image; no answer, no id.
            max_new_tokens: most tokens of an answer.
            task: the questions' task; None unless the card asks for it.
        """
        return self.backbone.generate(questions, max_new_tokens)

    def answer_with_branches(
        self, branches: Sequence[tuple[str, ...]], questions: Sequence[Sample], max_new_tokens: int
    ) -> list[Prediction]:
        """`answer` with only the given branches active, which may differ by question. branches: one tuple per question.

        Questions with the same branches are answered in one call of ``backbone.generate``.
        """

        def generate(active: tuple[str, ...], indices: list[int]) -> list[Prediction]:
            with adapters.activated(self.model, active):
                return self.backbone.generate([questions[index] for index in indices], max_new_tokens)

        return answer_in_groups(branches, generate)

    def extra_bytes(self, tasks: int) -> int:
        """Upper bound of the bytes stored after ``tasks`` tasks beyond one adapter of rank 32, samples not counted."""
        return self.rule.kept_bytes(self.adapter_parameters()) if self.rule else 0

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs besides `adapter_parameters` and the optimizer's state."""
        return self.rule.state_dict() if self.rule else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`. Within a task it is called after `before_task`."""
        if self.rule:
            self.rule.load_state_dict(state)


def check_hyperparameters(kind: type[Method], given: Mapping[str, Any]) -> None:
    """Raises UserError for a hyperparameter that is infinite, nan or out of its range, see `Method.ranges`.

    What else a value must be, its method says itself where it is made.
    """
    ranges = {name: own for base in reversed(kind.__mro__) for name, own in vars(base).get("ranges", {}).items()}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        check_range(name, value, *ranges.get(name, RANGE))
        if 0 < abs(value) < SMALLEST:
            raise UserError(f"{name} must be 0 or at least {SMALLEST} in size, got {value}")


def check_lr_factor(factor: float) -> None:
    """Raises UserError for a factor of the learning rate that is not positive and finite."""
    if not 0 < factor < float("inf"):
        raise UserError(f"lr_factor must be positive and finite, got {factor}")


def answer_in_groups(
    keys: Sequence[Hashable], generate: Callable[[Any, list[int]], list[Prediction]]
) -> list[Prediction]:
    """One answer per key, in the order of the keys.

    Args:
        keys: what the questions are grouped by.
        generate: called once per distinct key with the key and the indices of its questions; returns their answers.
    """
    answers: dict[int, Prediction] = {}
    for key in dict.fromkeys(keys):
        indices = [index for index, other in enumerate(keys) if other == key]
        answers |= zip(indices, generate(key, indices), strict=True)
    return [answers[index] for index in range(len(keys))]
