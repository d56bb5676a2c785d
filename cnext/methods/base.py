"""The interface of a continual-learning method: one dataclass of hyperparameters with hooks around training.

The runner calls, for every task: ``trainable`` and ``before_task``; per step ``transform_gradients`` (right after the
backward pass of the task loss), the gradients of ``extra_loss`` added, clipping, the optimizer, ``after_step``; then
``after_task``. Evaluation happens inside ``for_eval``. A hook that a method does not need is not written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone
from cnext.tasks.base import Task


class Method(ABC):
    """A subclass is a dataclass whose fields are its hyperparameters; each becomes a flag of ``cnext-run``."""

    @abstractmethod
    def setup(self, backbone: Backbone, generator: torch.Generator) -> None:
        """Attaches adapters to ``backbone.language_model``. Called once, before the first task."""

    @abstractmethod
    def trainable(self, backbone: Backbone, task: Task) -> dict[str, nn.Parameter]:
        """Makes exactly this task's parameters trainable and returns them by name; empty: the task is not trained."""

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int) -> None:
        """The task's parameters are about to be trained for ``steps`` optimizer steps."""

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        """Reads or changes ``.grad``, which holds the task loss's gradient: not clipped, no penalty in it."""

    def extra_loss(self) -> Tensor | None:
        """A penalty to add to the task loss, or None."""
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

    def state_dict(self) -> dict[str, Tensor]:
        """What the method needs to go on after an interruption, besides the adapters."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state, f"{type(self).__name__} has no state, got {sorted(state)}"
