"""The averages with an open task: their contexts, which one may write to a parameter, and copies without a model."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cnext.errors import UserError


class Average(Protocol):
    """What is asked of a `cnext.averaging.MovingAverage` here and in `state`."""

    name: ClassVar[str]
    kept: ClassVar[tuple[str, ...]]
    parameters: dict[str, nn.Parameter]
    step: int
    steps: int
    lost: str

    @property
    def swapped_in(self) -> bool: ...
    def begin_task(
        self, parameters: nn.Module | Mapping[str, nn.Parameter], steps: int, *, untrained: bool = False
    ) -> None: ...
    def end_task(self) -> object: ...
    def abort_task(self) -> None: ...
    def slots(self) -> dict[str, dict[str, Tensor]]: ...
    def current(self, kind: str) -> Iterable[str]: ...


A = TypeVar("A", bound=Average)
_opened: WeakKeyDictionary[Average, int] = WeakKeyDictionary()
"""The averages with an open task that writes to parameters, and when it was begun."""
_count = itertools.count()


class TaskContext(AbstractContextManager[A]):
    """What `MovingAverage.task` returns."""

    def __init__(
        self, average: A, parameters: nn.Module | Mapping[str, nn.Parameter], steps: int, untrained: bool
    ) -> None:
        self.average, self.parameters, self.steps, self.untrained = average, parameters, steps, untrained
        self.begun: Mapping[str, nn.Parameter] | None = None
        """The parameters of the task, which are another object in every task."""

    def __enter__(self) -> A:
        if self.begun is not None:
            raise UserError("task: this context was entered before; call average.task(...) again for another task")
        self.average.begin_task(self.parameters, self.steps, untrained=self.untrained)
        self.begun = self.average.parameters
        return self.average

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._is_open():
                self.average.end_task()
        finally:
            if self._is_open():
                self.average.abort_task()

    def _is_open(self) -> bool:
        """Whether the task was neither ended nor aborted within the block."""
        return self.average.parameters is self.begun


def opened(average: Average) -> None:
    """Records a task that was begun, or copied."""
    _opened[average] = next(_count)


def closed(average: Average) -> None:
    """Forgets it."""
    _opened.pop(average, None)


def _others(average: Average) -> Iterator[tuple[str, Average]]:
    """The others over some of the same parameters, each with this one's name of one."""
    if len(_opened) < 2 or average not in _opened:
        return
    own = {id(parameter): name for name, parameter in average.parameters.items()}
    for other in list(_opened):
        name = next((own[id(parameter)] for parameter in other.parameters.values() if id(parameter) in own), None)
        if name is not None and other is not average:
            yield name, other


def require_own_values(average: Average, what: str) -> None:
    """Raises UserError while another average is swapped in to some of the parameters."""
    for name, other in _others(average):
        if other.swapped_in:
            raise UserError(f"{what}: another average ({other.name}) is swapped in to {name!r}; swap it out first")


def _later(average: Average) -> list[tuple[str, Average]]:
    return [(name, other) for name, other in _others(average) if _opened[other] > _opened[average]]


def require_last(average: Average) -> None:
    """Raises UserError where a later task of another average is open over some of the parameters.

    Both would write to them, and the one that is second would average the first one's average.
    """
    if not _later(average):
        return
    gc.collect()  # one that nobody has any more is no rival
    if not (found := _later(average)):
        return
    name, other = found[0]
    raise UserError(
        f"end_task: {name!r} is also in a task of another average ({other.name}) that was begun later, and only one "
        "can write to it; end or abort that task, or call abort_task on this average"
    )


def written(average: Average) -> None:
    """Called where a task ends: the earlier ones over the same parameters have lost the values in training."""
    for name, other in _others(average):
        other.lost = f"another average ({average.name}) has ended a task over {name!r}, a parameter of this one too"


def require_held(parameters: Mapping[str, nn.Parameter], what: str) -> None:
    """Checks the parameters of a copy, whether made by deepcopy or pickle: that they are a model's own.

    Raises:
        UserError: nothing else has one of them, as where the average was copied without its model; or they share
            memory with another process.
    """
    advice = (
        "copy both at once, as copy.deepcopy((model, average)), or call abort_task on the copy; a new process begins "
        "the task itself and loads state_dict()"
    )
    if any(parameter.device.type == "cpu" and parameter.is_shared() for parameter in parameters.values()):
        raise UserError(f"{what}: this average was sent here by another process, whose parameters it has; {advice}")
    (alone,) = _references({"": nn.Parameter(torch.empty(0))})
    for name, count in zip(parameters, _references(parameters), strict=True):
        if count <= alone:
            raise UserError(
                f"{what}: this average was copied within a task and without its model: nothing else has its {name!r}; "
                f"{advice}"
            )


def _references(parameters: Mapping[str, nn.Parameter]) -> list[int]:
    return [sys.getrefcount(parameter) for parameter in parameters.values()]
