"""The interface of moving averages over parameters: `MovingAverage`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cnext.errors import UserError

Rule = Literal["pema", "pema-kron", "pema-step", "pema-literal", "pema-released", "dema", "constant", "none"]
"""Names of the averaging rules; `cnext.averaging.RULES` maps each to its class."""
Statistics = dict[str, tuple[float, float]]
"""Parameter name to mean and standard deviation of beta, the weight of the old value."""


class MovingAverage(ABC):
    """An average of parameters over the course of a task, for any torch model and optimizer.

    ``update`` is called where the gradient has just been computed, so that a per-step rule averages the parameters that
    the gradient belongs to; `end_task` averages the last step's result and writes the average into the parameters.
    During a task a per-step average lives beside the parameters, and `for_eval` swaps it in. Tensors are changed in
    place on their own device, and nothing synchronizes with the device before `end_task`. Under data parallelism every
    rank computes the same average, because ``.grad`` is read after its reduction.

    Parameters: float32, bfloat16 or float16, of any shape. Memory: see the rules.

    Example:
        >>> import torch
        >>> from cnext.averaging import Pema
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> average = Pema(c=5.0)
        >>> for target in (0.0, 1.0):
        ...     with average.task(model, steps=4):
        ...         for _ in range(4):
        ...             (model(torch.ones(8, 2)) - target).square().mean().backward()
        ...             average.update()
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        >>> sorted(average.statistics)
        ['bias', 'weight']
    """

    name: ClassVar[str]
    persistent_statistics: ClassVar[int] = 0
    """float32 values per parameter that the rule keeps between tasks."""

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        """The parameters of the open task by name; empty between tasks."""
        self.step = 0
        """Steps of the open task that `update` has seen."""
        self.steps = 0
        """Steps that the open task will take; 0 between tasks."""
        self.rate = 1.0
        """What `update` was given."""
        self.statistics: Statistics = {}
        """What the last `end_task` returned."""
        self._training_values: dict[str, Tensor] | None = None

    def task(
        self, parameters: nn.Module | Mapping[str, nn.Parameter], *, steps: int
    ) -> AbstractContextManager[MovingAverage]:
        """`begin_task` and `end_task` as a context, which yields this average.

        `end_task` runs where the block ends normally; its result is ``statistics``. Where the block raises, the task is
        cancelled as by `cancel_task`: the parameters keep the values that training left in them. Enter it once; tasks
        cannot be nested.

        Args:
            parameters: a module, of which the parameters that require a gradient are taken, or the parameters by name.
            steps: optimizer steps of the task, at least 1.

        Raises:
            UserError: on entering, as `begin_task`, or because the context was entered before; on leaving, as
                `end_task`.

        Example:
            >>> import torch
            >>> from cnext.averaging import Constant
            >>> model, average = torch.nn.Linear(2, 1), Constant()
            >>> with average.task(model, steps=1):
            ...     model(torch.ones(1, 2)).sum().backward()
            ...     average.update()
        """
        return _TaskContext(self, parameters, steps)

    def begin_task(self, parameters: nn.Module | Mapping[str, nn.Parameter], steps: int) -> None:
        """Opens a task that trains these parameters from their present values.

        Args:
            parameters: a module, of which the parameters that require a gradient are taken, or the parameters by name.
                A name is the same in every task.
            steps: optimizer steps of the task, at least 1.

        Raises:
            UserError: a task is open, ``steps`` is not positive, or there is nothing to train.
        """
        if self.steps:
            raise UserError(
                "begin_task: a task is open, and tasks cannot be nested; call end_task or cancel_task first"
            )
        if not isinstance(steps, int) or steps < 1:
            raise UserError(f"begin_task: steps is {steps!r}; expected a whole number of at least 1")
        self.parameters, self.step, self.steps = _named(parameters), 0, steps
        with ExitStack() as undo:
            undo.callback(self.cancel_task)
            self.start()
            undo.pop_all()

    def update(self, losses: Tensor | None = None, *, rate: float = 1.0) -> None:
        """Reads one step's ``.grad`` (None counts as zero): after the backward pass, before clipping and penalties.

        Args:
            losses: (batch,) the samples' own losses with their graph, for a rule that was made with ``unit="sample"``.
            rate: learning rate of this step over the schedule's largest, for a rule that pulls (`PemaKron`).

        Raises:
            UserError: no task is open, it has had all its steps, the average is swapped in, or the rate is not from 0
                to 1.
        """
        if not self.steps:
            raise UserError("update: no task is open; call begin_task first, or update inside `with average.task(...)`")
        if self.step >= self.steps:
            raise UserError(f"update: the task has {self.steps} steps and this is one more; begin it with its steps")
        self._require_swapped_out("update")
        if not 0 <= rate <= 1:
            raise UserError(
                f"update: expected rate, the learning rate over the schedule's largest, from 0 to 1, got {rate}"
            )
        self.rate = rate
        self.read_gradients(losses)
        self.step += 1

    def end_task(self) -> Statistics:
        """Writes the average into the parameters and closes the task.

        Returns:
            Name to mean and standard deviation of beta, the weight of the old, where the rule has one. Also kept as
            ``statistics``.

        Raises:
            UserError: no task is open, or the average is swapped in.
        """
        if not self.steps:
            raise UserError("end_task: no task is open; call begin_task first")
        self._require_swapped_out("end_task")
        self.statistics = self.finish()
        self._close()
        return self.statistics

    def cancel_task(self) -> None:
        """Closes the open task without averaging; what is kept of earlier tasks stays.

        The parameters keep the values that training left in them. An average that is swapped in is swapped out first.
        """
        if self._training_values is not None:
            self.swap_out()
        self._close()

    def _close(self) -> None:
        self.reset()
        self.parameters, self.step, self.steps = {}, 0, 0

    @abstractmethod
    def start(self) -> None:
        """Called by `begin_task`: allocates the task's state. ``self.parameters`` hold their starting values."""

    def read_gradients(self, losses: Tensor | None) -> None:
        """Called by `update`: one step's gradients are in ``.grad``."""

    @abstractmethod
    def finish(self) -> Statistics:
        """Called by `end_task`: writes the average into the parameters, and returns as `end_task` does."""

    def reset(self) -> None:
        """Called where a task is closed: drops the state that belongs to the task alone."""

    def slots(self) -> dict[str, dict[str, Tensor]]:
        """The state by kind, and by parameter name within a kind: the tensors themselves, no copies."""
        return {}

    def current(self, kind: str) -> Iterable[str]:
        """The names of the open task's state of a kind of `slots`."""
        return self.parameters

    def kept_bytes(self, parameters: Mapping[str, Tensor]) -> int:
        """Bytes that the rule keeps between tasks over these parameters."""
        return 4 * self.persistent_statistics * sum(parameter.numel() for parameter in parameters.values())

    def evaluated(self) -> Mapping[str, Tensor]:
        """The values to evaluate in place of the parameters, by name; empty: the parameters themselves."""
        return {}

    @torch.no_grad()
    def swap_in(self) -> None:
        """Writes the average into the parameters and keeps a copy of their values. Call `swap_out` before training on.

        Raises:
            UserError: the average is swapped in already.
        """
        self._require_swapped_out("swap_in")
        self._training_values = {name: self.parameters[name].detach().clone() for name in self.evaluated()}
        for name, average in self.evaluated().items():
            self.parameters[name].copy_(average)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Undoes `swap_in`, to the bit.

        Raises:
            UserError: the average is not swapped in.
        """
        if self._training_values is None:
            raise UserError("swap_out: the average is not swapped in; call swap_in first")
        for name, value in self._training_values.items():
            self.parameters[name].copy_(value)
        self._training_values = None

    @contextmanager
    def for_eval(self) -> Iterator[None]:
        """A context in which the parameters hold the average, as between `swap_in` and `swap_out`."""
        self.swap_in()
        try:
            yield
        finally:
            self.swap_out()

    def _require_swapped_out(self, what: str) -> None:
        if self._training_values is not None:
            raise UserError(f"{what}: the average is swapped in; call swap_out first")

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as a flat dict that safetensors takes: ``<kind>.<parameter name>``, and 0-d counters.

        Raises:
            UserError: the average is swapped in.
        """
        self._require_swapped_out("state_dict")
        state = {"step": torch.tensor(self.step), "steps": torch.tensor(self.steps)}
        for kind, tensors in self.slots().items():
            state |= {f"{kind}.{name}": _unshared(tensor) for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned. For a state saved inside a task, first call `begin_task` as then.

        Raises:
            UserError: the state belongs to another rule, or to a task over other parameters or steps.
        """
        if lost := {"step", "steps"} - state.keys():
            raise UserError(f"load_state_dict: {min(lost)!r} is missing; expected what state_dict returned")
        slots = self.slots()
        loaded: dict[str, dict[str, Tensor]] = {kind: {} for kind in slots}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if name and kind not in slots:
                raise UserError(f"load_state_dict: {key!r} is not a state of rule {self.name!r}")
            if name:
                loaded[kind][name] = tensor
        if int(state["steps"]) != self.steps:
            raise UserError(
                f"load_state_dict: the state was saved in a task of {int(state['steps'])} steps, and the open task has "
                f"{self.steps} (0: no task); call begin_task with the same arguments first"
            )
        for kind, tensors in loaded.items():
            self._load(kind, slots[kind], tensors)
        self.step = int(state["step"])

    def _load(self, kind: str, slot: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        current = set(self.current(kind))
        if missing := [name for name in slot if name in current and name not in tensors]:
            raise UserError(f"load_state_dict: no {kind} for {missing[0]!r}, which the open task trains")
        for name, tensor in tensors.items():
            if name in slot and slot[name].shape == tensor.shape and slot[name].dtype == tensor.dtype:
                slot[name].copy_(tensor)
            elif name not in slot and name not in current:
                slot[name] = tensor.clone()
            else:
                here = f"{tuple(slot[name].shape)} {slot[name].dtype}" if name in slot else "no such state"
                raise UserError(
                    f"load_state_dict: {kind}.{name} is {tuple(tensor.shape)} {tensor.dtype}; expected {here}"
                )


class _TaskContext(AbstractContextManager[MovingAverage]):
    """What `MovingAverage.task` returns."""

    def __init__(self, average: MovingAverage, parameters: nn.Module | Mapping[str, nn.Parameter], steps: int) -> None:
        self.average, self.parameters, self.steps, self.entered = average, parameters, steps, False

    def __enter__(self) -> MovingAverage:
        if self.entered:
            raise UserError("task: this context was entered before; call average.task(...) again for another task")
        self.average.begin_task(self.parameters, self.steps)
        self.entered = True
        return self.average

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.average.end_task()
        finally:
            if self.average.steps:
                self.average.cancel_task()


def _named(parameters: nn.Module | Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """A task's parameters by name."""
    if isinstance(parameters, Mapping):
        return dict(parameters)
    if not isinstance(parameters, nn.Module):
        kind = type(parameters).__name__
        raise UserError(f"begin_task: parameters is a {kind}; expected a module, or a mapping of name to parameter")
    found = {name: parameter for name, parameter in parameters.named_parameters() if parameter.requires_grad}
    if not found:
        raise UserError("begin_task: no parameter of the module requires a gradient; unfreeze those to train")
    return found


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in a storage of its own: safetensors refuses shared ones."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def by_kind(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Names grouped by device and dtype: the groups that one op call takes."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    return groups.values()


def match_strides(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient in the strides of its parameter; zeros for None."""
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if gradient.layout == parameter.layout and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype, requires_grad=False).copy_(gradient)


def mean_and_std(row: list[float]) -> tuple[float, float]:
    """Mean and standard deviation from a count, a sum and a sum of squares."""
    count, total, squares = row
    mean = total / count if count else 0.0
    return mean, max(squares / count - mean * mean, 0.0) ** 0.5 if count else 0.0
