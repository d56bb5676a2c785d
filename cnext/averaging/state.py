"""The state of an average as a flat dict of tensors, which is checked as a whole before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cnext.averaging.open_tasks import Average
from cnext.distributed.wrapped_names import without_wrappers
from cnext.errors import UserError

Slots = dict[str, dict[str, Tensor]]


def flat(average: Average) -> dict[str, Tensor]:
    """``<kind>.<parameter name>`` to tensor, and 0-d counters."""
    state = {"step": torch.tensor(average.step), "steps": torch.tensor(average.steps)}
    for kind, tensors in average.slots().items():
        state |= {f"{kind}.{name}": _unshared(tensor) for name, tensor in tensors.items()}
    return state


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in a storage of its own: safetensors refuses shared ones."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load(average: Average, state: Mapping[str, Tensor]) -> None:
    """Puts a state in place of the average's own, all of it or nothing. See `MovingAverage.load_state_dict`."""
    found, step = _by_kind(average, state), _counters(average, state)
    slots = average.slots()
    for kind, tensors in found.items():
        _require_fitting(average, kind, slots[kind], tensors)
    for kind, tensors in found.items():
        slot, current = slots[kind], set(average.current(kind))
        for name in slot.keys() - tensors:
            del slot[name]  # of earlier tasks, which the state knows nothing of
        for name, tensor in tensors.items():
            if name in current:
                slot[name].copy_(tensor)
            else:
                slot[name] = tensor.detach().clone()
    average.step = step


def _counters(average: Average, state: Mapping[str, Tensor]) -> int:
    """The step. Raises UserError for a state of a task of other steps."""
    counts = {}
    for name in ("step", "steps"):
        if name not in state:
            raise UserError(f"load_state_dict: {name!r} is missing; expected what state_dict returned")
        value = state[name]
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point() or value.is_complex():
            raise UserError(f"load_state_dict: {name!r} is {_kind(value)}; expected one whole number")
        counts[name] = int(value)
    if counts["steps"] != average.steps:
        raise UserError(
            f"load_state_dict: the state was saved in a task of {counts['steps']} steps, and the open task has "
            f"{average.steps} (0: no task); call begin_task with the same arguments first"
        )
    if not 0 <= counts["step"] <= counts["steps"]:
        raise UserError(f"load_state_dict: step is {counts['step']} of {counts['steps']}; the state is damaged")
    return counts["step"]


def _by_kind(average: Average, state: Mapping[str, Tensor]) -> Slots:
    """The tensors by kind, and by parameter name without the prefixes of wrappers."""
    slots = average.slots()
    found: Slots = {kind: {} for kind in slots}
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        if not isinstance(tensor, Tensor):
            raise UserError(f"load_state_dict: {key!r} is {_kind(tensor)}; expected a tensor")
        if name and kind not in slots:
            raise UserError(f"load_state_dict: {key!r} is not a state of rule {average.name!r}")
        if name:
            found[kind][name] = tensor
    return {kind: without_wrappers(found[kind], f"load_state_dict: {kind}", slots[kind]) for kind in slots}


def _require_fitting(average: Average, kind: str, slot: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for another shape or dtype than the open task's, a lack, and a past that can be none."""
    current = set(average.current(kind))
    if missing := [name for name in slot if name in current and name not in tensors]:
        raise UserError(f"load_state_dict: no {kind} for {missing[0]!r}, which the open task trains")
    for name, tensor in tensors.items():
        expected = _kind(slot[name]) if name in current and name in slot else None
        if expected is None and (name in current or kind not in average.kept):
            expected = "no such state"
        if expected is not None and _kind(tensor) != expected:
            raise UserError(f"load_state_dict: {kind}.{name} is {_kind(tensor)}; expected {expected}")
        if kind in average.kept and (tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())):
            raise UserError(
                f"load_state_dict: {kind}.{name} is {_kind(tensor)}, with "
                f"{int(tensor.numel() - tensor.isfinite().sum())} values that are not finite; expected torch.float32 "
                "and finite values: the state is damaged, load an earlier one"
            )


def _kind(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
