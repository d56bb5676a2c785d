"""The interface of a moving average over parameters: what it is called with, when, and what it must remember."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from cnext.errors import UserError


class MovingAverage(ABC):
    """An average of parameters over the course of a task, by one rule, for any torch model and optimizer.

        average.begin_task(dict(model.named_parameters()), steps)
        for batch in batches:
            loss(batch).backward()
            average.update()
            optimizer.step(); optimizer.zero_grad()
        average.end_task()

    ``update`` sees the parameters that the gradient was taken at, so a per-step rule averages a pair that belongs
    together; the last step's result is averaged by ``end_task``, after which the parameters are the average. Where the
    average lives beside the parameters during a task, ``for_eval`` puts it into them for a while. All tensors are read
    and written in place on their own device, nothing waits for the device before ``end_task``, and under data
    parallelism every rank computes the same average, because ``.grad`` is read after its reduction.
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
        """Steps that the open task will take."""
        self._held: dict[str, Tensor] | None = None

    def begin_task(self, parameters: Mapping[str, nn.Parameter], steps: int) -> None:
        """Opens a task that trains these parameters from their present values.

        Args:
            parameters: the parameters that will be trained, by a name that is the same in every task.
            steps: optimizer steps, at least 1.

        Raises:
            UserError: a task is open already, or ``steps`` is not positive.
        """
        if self.parameters:
            raise UserError("begin_task: a task is open already; call end_task first")
        if steps < 1:
            raise UserError(f"begin_task: steps is {steps}; expected at least 1")
        self.parameters, self.step, self.steps = dict(parameters), 0, steps
        self.start()

    def update(self, losses: Tensor | None = None) -> None:
        """Reads ``.grad`` (None is zero): after the backward pass, before clipping and before any penalty is added.

        Args:
            losses: (batch,) the samples' own losses, for a rule that was made with ``unit="sample"`` alone.

        Raises:
            UserError: called oftener than ``steps`` times, outside a task, or while the average is swapped in.
        """
        if self.step >= self.steps:
            raise UserError(f"update: the task was opened for {self.steps} steps, and all of them are done")
        self._require_live("update")
        self.read_gradients(losses)
        self.step += 1

    def end_task(self) -> dict[str, tuple[float, float]]:
        """Makes the parameters the average, and closes the task.

        Returns:
            Name to mean and standard deviation of beta, the weight of the old, where the rule has one.

        Raises:
            UserError: the average is swapped in.
        """
        self._require_live("end_task")
        statistics = self.finish()
        self.parameters, self.step, self.steps = {}, 0, 0
        return statistics

    @abstractmethod
    def start(self) -> None:
        """A task has been opened; ``self.parameters`` hold their starting values."""

    def read_gradients(self, losses: Tensor | None) -> None:
        """One step's gradients are in ``.grad``. Called by `update`; a rule without an average ignores them."""

    @abstractmethod
    def finish(self) -> dict[str, tuple[float, float]]:
        """The last step is done: puts the average into the parameters. Returns as `end_task`."""

    def slots(self) -> dict[str, dict[str, Tensor]]:
        """The state by kind, and by parameter name within a kind. The tensors are the state itself, not copies."""
        return {}

    def evaluated(self) -> Mapping[str, Tensor]:
        """What evaluation should see instead of the parameters, by name; empty: the parameters themselves."""
        return {}

    @torch.no_grad()
    def swap_in(self) -> None:
        """Puts the average into the parameters and keeps their values. Training must not go on before `swap_out`.

        Raises:
            UserError: swapped in already.
        """
        self._require_live("swap_in")
        self._held = {name: self.parameters[name].detach().clone() for name in self.evaluated()}
        for name, average in self.evaluated().items():
            self.parameters[name].copy_(average)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Undoes `swap_in`, to the bit.

        Raises:
            UserError: not swapped in.
        """
        if self._held is None:
            raise UserError("swap_out: nothing is swapped in; call swap_in first")
        for name, value in self._held.items():
            self.parameters[name].copy_(value)
        self._held = None

    @contextmanager
    def for_eval(self) -> Iterator[None]:
        """Inside, the parameters are what the rule would evaluate."""
        self.swap_in()
        try:
            yield
        finally:
            self.swap_out()

    def _require_live(self, what: str) -> None:
        if self._held is not None:
            raise UserError(f"{what}: the average is swapped in; call swap_out first")

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, flat, as safetensors takes it: ``kind.parameter name``, and 0-d counters.

        Raises:
            UserError: the average is swapped in.
        """
        self._require_live("state_dict")
        state = {"step": torch.tensor(self.step), "steps": torch.tensor(self.steps)}
        for kind, tensors in self.slots().items():
            state |= {f"{kind}.{name}": _alone(tensor) for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave. For a state saved inside a task, first call `begin_task` as then.

        Raises:
            UserError: the state belongs to another rule, or to a task over other parameters or steps.
        """
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
                f"load_state_dict: the state was saved in a task of {int(state['steps'])} steps, and this one has "
                f"{self.steps} (0: no task is open); call begin_task as when it was saved"
            )
        for kind, tensors in loaded.items():
            self._load(kind, slots[kind], tensors)
        self.step = int(state["step"])

    def _load(self, kind: str, slot: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        if missing := [name for name in slot if name in self.parameters and name not in tensors]:
            raise UserError(f"load_state_dict: no {kind} for {missing[0]!r}, which the open task trains")
        for name, tensor in tensors.items():
            if name in slot and slot[name].shape == tensor.shape and slot[name].dtype == tensor.dtype:
                slot[name].copy_(tensor)
            elif name not in slot and name not in self.parameters:
                slot[name] = tensor.clone()
            else:
                here = f"{tuple(slot[name].shape)} {slot[name].dtype}" if name in slot else "nothing"
                raise UserError(
                    f"load_state_dict: {kind}.{name} is {tuple(tensor.shape)} {tensor.dtype}; here it is {here}"
                )


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory that it shares with no other, contiguous."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def by_kind(tensors: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Names in groups whose tensors have one device and one dtype, which is what an op takes in one call."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    return groups.values()


def laid_out(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient laid out in memory as its parameter is; zeros where there is none."""
    if gradient is None:
        return torch.zeros_like(parameter, requires_grad=False)
    if gradient.layout == parameter.layout and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype, requires_grad=False).copy_(gradient)


def spread(row: list[float]) -> tuple[float, float]:
    """Mean and standard deviation from number, sum and sum of squares."""
    number, total, squares = row
    mean = total / number if number else 0.0
    return mean, max(squares / number - mean * mean, 0.0) ** 0.5 if number else 0.0
