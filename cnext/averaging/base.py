"""The interface of moving averages over parameters: `MovingAverage`."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cnext.averaging import open_tasks
from cnext.averaging import state as _state
from cnext.averaging.task_parameters import named, require_past, require_supported
from cnext.errors import UserError

Rule = Literal["pema", "pema-kron", "pema-step", "pema-literal", "pema-released", "dema", "constant", "none"]
"""Names of the averaging rules; `cnext.averaging.RULES` maps each to its class."""
Place = Literal["before optimizer", "after optimizer", "micro-batch"]
"""Where `MovingAverage.update` is called: in every optimizer step before the optimizer, or after it; or after every
micro-batch, for the last of a step after the optimizer."""
Statistics = dict[str, tuple[float, float]]
"""Parameter name to mean and standard deviation of beta, the weight of the old value."""
NO_GRADIENT = (
    "update: no parameter of the task has a gradient, every .grad is None; call update after the backward pass and "
    "before the optimizer's step and zero_grad, and begin the task with the parameters of the model that is trained; "
    "in a callback of transformers' Trainer that is on_pre_optimizer_step, not on_step_end"
)


class MovingAverage(ABC):
    """An average of parameters over the course of a task, for any torch model and optimizer.

    ``update`` is called where the gradient has just been computed, so that a per-step rule averages the parameters that
    the gradient belongs to; `end_task` averages the last step's result and writes the average into the parameters.
    Rules as their authors released them are called elsewhere, see ``place``.
    During a task a per-step average lives beside the parameters, and `for_eval` swaps it in. Tensors are changed in
    place on their own device, and nothing synchronizes with the device before `end_task`. Under data parallelism every
    rank computes the same average, because ``.grad`` is read after its reduction.

    Parameters: float32, bfloat16 or float16, of any shape. Memory: see the rules. They are known by their names,
    without the prefixes of torch.compile, DistributedDataParallel and FSDP: a model may be wrapped between tasks.

    Within a task an average is copied or pickled together with its model, as by ``copy.deepcopy((model, average))``;
    the copies go on as the originals, to the bit. A copy of the average alone has nothing to average, and is refused.
    Several averages may have a task over one parameter, but only the one begun last can end it.

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
    kept: ClassVar[tuple[str, ...]] = ()
    """The kinds of `slots` that are kept between tasks."""
    persistent_statistics: ClassVar[int] = 0
    """float32 values per parameter that the rule keeps between tasks."""
    writes: ClassVar[bool] = True
    """Whether the rule writes to the parameters."""
    reads_gradients: ClassVar[bool] = True
    """Whether the rule reads gradients, so that a task without any is an error."""
    place: Place = "before optimizer"
    """Where `update` is called. The steps of `begin_task` are the calls."""

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
        self.lost = ""
        """Why the open task cannot go on: what has overwritten the values in training."""
        self._training_values: dict[str, Tensor] | None = None
        self._seen_gradient = False
        self._known: frozenset[str] = frozenset()
        """Of what there was a past before the open task."""
        self._copied = False
        """Whether this is a copy, made within a task, that has not been used yet."""

    def __copy__(self) -> MovingAverage:
        raise UserError(
            "copy.copy of an average would share its state with it; use copy.deepcopy, and within a task copy the "
            "model at once: copy.deepcopy((model, average))"
        )

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        if self.steps:
            self._copied = True
            self.restore()
            open_tasks.opened(self)
        for kind in self.kept if not self.steps else ():
            slot = self.slots()[kind]
            slot.update({name: tensor.clone() for name, tensor in slot.items() if tensor.is_shared()})

    def task(
        self, parameters: nn.Module | Mapping[str, nn.Parameter], *, steps: int, untrained: bool = False
    ) -> AbstractContextManager[MovingAverage]:
        """`begin_task` and `end_task` as a context, which yields this average.

        `end_task` runs where the block ends normally; its result is ``statistics``. Where the block raises, the task is
        aborted as by `abort_task`: the parameters keep the values that training left in them. A task that was ended or
        aborted within the block stays so. Enter it once; tasks cannot be nested.

        Args:
            parameters: a module, of which the parameters that require a gradient are taken, or the parameters by name.
            steps: optimizer steps of the task, at least 1.
            untrained: see `begin_task`.

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
        return open_tasks.TaskContext(self, parameters, steps, untrained)

    def begin_task(
        self, parameters: nn.Module | Mapping[str, nn.Parameter], steps: int, *, untrained: bool = False
    ) -> None:
        """Opens a task that trains these parameters from their present values.

        Args:
            parameters: a module, of which the parameters that require a gradient are taken, or the parameters by name.
                A name is the same in every task. The prefixes of wrappers are dropped: ``_orig_mod.``, and ``module.``
                where all names begin with it.
            steps: optimizer steps of the task, at least 1.
            untrained: whether it is right that no earlier task trained any of the parameters.

        Raises:
            UserError: a task is open, ``steps`` is not positive, there is nothing to train, or a parameter cannot be
                averaged: it is integer, complex, float64 or sparse, on the meta device, or shares memory with another.
                Or the names are those of earlier tasks with another prefix, or another average is swapped in.

        Warns:
            RuntimeWarning: no earlier task trained any of the parameters, though there were some.
        """
        if self.steps:
            raise UserError("begin_task: a task is open, and tasks cannot be nested; call end_task or abort_task first")
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
            raise UserError(f"begin_task: steps is {steps!r}; expected a whole number of at least 1")
        self.parameters, self.step, self.steps = named(parameters, self.past()), 0, int(steps)
        self._known = frozenset(self.past())
        with ExitStack() as undo:
            undo.callback(self.abort_task)
            self.check_parameters()
            if self.writes:
                open_tasks.opened(self)
                open_tasks.require_own_values(self, "begin_task")
            if not untrained:
                past = {name: tensor.shape for name, tensor in self.past().items() if bool(tensor.any())}
                require_past(self.sizes_of_past(), past)
            self.start()
            undo.pop_all()

    def update(self, losses: Tensor | None = None, *, rate: float = 1.0) -> None:
        """Reads one step's ``.grad``: after the backward pass, before clipping and penalties.

        A parameter without a gradient, as in a branch that the step did not use, counts as one with a gradient of zero.

        Args:
            losses: (batch,) the samples' own losses with their graph, for a rule that was made with ``unit="sample"``.
            rate: learning rate of this step over the schedule's largest, for a rule that pulls (`PemaKron`).

        Raises:
            UserError: no task is open, it has had all its steps, an average is swapped in, the rate is not from 0 to
                1, no parameter has had a gradient since the task began, another average has ended a task over some of
                the parameters meanwhile, or this is a copy without its model.

        Warns:
            RuntimeWarning: no parameter has a gradient, unlike in earlier steps.
        """
        if not self.steps:
            raise UserError("update: no task is open; call begin_task first, or update inside `with average.task(...)`")
        if self.step >= self.steps:
            raise UserError(f"update: the task has {self.steps} steps and this is one more; begin it with its steps")
        self._require_usable("update")
        if not 0 <= rate <= 1:
            raise UserError(
                f"update: expected rate, the learning rate over the schedule's largest, from 0 to 1, got {rate}"
            )
        self._require_gradient()
        self.rate = rate
        self.read_gradients(losses)
        self.step += 1

    def end_task(self) -> Statistics:
        """Writes the average into the parameters and closes the task.

        Returns:
            Name to mean and standard deviation of beta, the weight of the old, where the rule has one. Also kept as
            ``statistics``.

        Raises:
            UserError: no task is open, an average is swapped in, another average has or had a task over some of the
                parameters, or `update` has seen too few of the task's steps: none for a rule that averages at every
                step, at most half of them for `Pema` and `PemaKron`. The squared gradients are out of float32's range.
                Nothing is written then, and the task stays open.

        Warns:
            RuntimeWarning: a rule that averages at every step has seen fewer steps than the task was begun with.
        """
        if not self.steps:
            raise UserError("end_task: no task is open; call begin_task first")
        self._require_usable("end_task")
        open_tasks.require_last(self)
        self.require_steps()
        self.statistics = self.finish()
        open_tasks.written(self)
        self._close()
        return self.statistics

    def abort_task(self) -> None:
        """Abandons the open task: the average is as before `begin_task`, and the task leaves no trace in later ones.

        The parameters keep the values that training left in them: the average has no others to give back, but where it
        is swapped in, which is undone first. To train the task anew, load the model's own checkpoint. Without an open
        task nothing happens.

        Example:
            >>> import torch
            >>> from cnext.averaging import Pema
            >>> average = Pema()
            >>> average.begin_task(torch.nn.Linear(2, 1), steps=4)
            >>> average.abort_task()
            >>> average.steps
            0
        """
        if self.swapped_in:
            self.swap_out()
        self._close()
        for kind in self.kept:
            slot = self.slots()[kind]
            for name in [name for name in slot.keys() - self._known if not slot[name].any()]:
                del slot[name]

    cancel_task = abort_task
    """`abort_task` by its earlier name."""

    def _close(self) -> None:
        self.reset()
        open_tasks.closed(self)
        self.parameters, self.step, self.steps, self._seen_gradient = {}, 0, 0, False
        self.lost, self._copied = "", False

    def _require_usable(self, what: str) -> None:
        """Raises UserError where the parameters do not hold, or are not, what is trained."""
        self._require_swapped_out(what)
        if self._copied:
            open_tasks.require_held(self.parameters, what)
            self._copied = False
        if self.lost:
            raise UserError(f"{what}: {self.lost}; call abort_task")
        open_tasks.require_own_values(self, what)

    def _require_gradient(self) -> None:
        """Raises UserError in a task's first step without a gradient or with sparse ones. Warns in a later one."""
        if not self.reads_gradients:
            return
        found = self.has_gradient()
        if found and not self._seen_gradient:
            for name, parameter in self.parameters.items():
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise UserError(
                        f"update: the gradient of {name!r} is {parameter.grad.layout}; expected a dense one"
                    )
            self._seen_gradient = True
        elif not found and not self._seen_gradient:
            raise UserError(NO_GRADIENT)
        elif not found:
            warnings.warn(f"{NO_GRADIENT}. It counts as zero", RuntimeWarning, stacklevel=3)

    def has_gradient(self) -> bool:
        """Whether the step left a gradient in any parameter, be it zero."""
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def warn_of_zeros(self, total: float) -> None:
        """Called at a task's end. total: sum of the squared gradients that the rule has read."""
        if not total:
            warnings.warn(
                f"{self.name}: every gradient that was read was zero or not finite, and the task has no weight in the "
                "average; call update where .grad holds the step's gradient, before zero_grad",
                RuntimeWarning,
                stacklevel=4,
            )

    def require_range(self, total: float, size: int) -> None:
        """Called at a task's end: raises UserError where its squared gradients over- or underflow float32.

        Args:
            total: their sum.
            size: their number, so that size / total is what brings their mean to 1.
        """
        if not math.isfinite(total) or (total and size / total > torch.finfo(torch.float32).max):
            raise UserError(
                f"end_task: the squared gradients sum to {total:g}, out of float32's range, so {self.name} cannot "
                "weigh the task; check the loss and its scale (fp16 gradients are unscaled first), and call abort_task"
            )

    def check_parameters(self) -> None:
        """Called by `begin_task`: raises UserError for parameters that the rule cannot average."""
        require_supported(self.parameters)

    def past(self) -> Mapping[str, Tensor]:
        """What is kept of earlier tasks, zero where it says nothing."""
        return {}

    def sizes_of_past(self) -> Mapping[str, torch.Size]:
        """The shapes of `past` for the open task's parameters."""
        return {name: parameter.shape for name, parameter in self.parameters.items()}

    def require_steps(self) -> None:
        """Called by `end_task` first: raises UserError where `update` has seen too few steps for the rule."""

    @abstractmethod
    def start(self) -> None:
        """Called by `begin_task`: allocates the task's state. ``self.parameters`` hold their starting values."""

    def read_gradients(self, losses: Tensor | None) -> None:
        """Called by `update`: one step's gradients are in ``.grad``."""

    @abstractmethod
    def finish(self) -> Statistics:
        """Called by `end_task`: writes the average into the parameters, and returns as `end_task` does."""

    def restore(self) -> None:
        """Called on a copy made within a task: connects again what a pickle takes apart."""

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
            UserError: an average is swapped in already, or as in `update`.
        """
        self._require_usable("swap_in")
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

    @property
    def swapped_in(self) -> bool:
        """Whether the average is swapped in."""
        return self._training_values is not None

    def _require_swapped_out(self, what: str) -> None:
        if self.swapped_in:
            raise UserError(f"{what}: the average is swapped in; call swap_out first")

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as a flat dict that safetensors takes: ``<kind>.<parameter name>``, and 0-d counters.

        Raises:
            UserError: the average is swapped in.
        """
        self._require_swapped_out("state_dict")
        return _state.flat(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned. For a state saved inside a task, first call `begin_task` as then.

        What the average has of tasks that the state knows nothing of is dropped. The prefixes of wrappers in the names
        do not count.

        Raises:
            UserError: the state belongs to another rule, or to a task over other parameters or steps; a tensor has
                another shape or dtype; or an average is swapped in. Nothing is changed then.
        """
        self._require_swapped_out("load_state_dict")
        _state.load(self, state)


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
