"""A trainer's gradients under `AveragingCallback`: clipping is postponed, and those of frozen branches are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnext.distributed import collectives

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


class Clipping:
    """A trainer's ``accelerator.clip_grad_norm_`` that computes the norm, unscales, and within a step clips nothing.

    It stays after an error, and then clips as before in trainings without the callback.
    """

    def __init__(self, trainer: Trainer, callback: TrainerCallback) -> None:
        self.trainer, self.callback = trainer, callback
        self.plain = trainer.accelerator.clip_grad_norm_
        self.within = self.called = False

    @classmethod
    def of(cls, trainer: Trainer, callback: TrainerCallback) -> Clipping:
        """The trainer's, put there by its first training."""
        found = trainer.accelerator.clip_grad_norm_
        if not isinstance(found, cls) or found.callback is not callback:
            found = cls(trainer, callback)
            trainer.accelerator.clip_grad_norm_ = found  # pyright: ignore[reportAttributeAccessIssue]
        found.close()
        return found

    def open(self) -> None:
        """Begins a step."""
        self.within, self.called = True, False

    def close(self) -> bool:
        """Ends a step. Returns whether its gradients would have been clipped."""
        called, self.within, self.called = self.called, False, False
        return called

    def __call__(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor | None:
        postponed = self.within and any(each is self.callback for each in self.trainer.callback_handler.callbacks)
        self.called = self.called or postponed
        return self.plain(parameters, math.inf if postponed else max_norm, norm_type=norm_type)


class Observed:
    """Frozen parameters whose gradients are read, out of Trainer's sight: neither in its norm nor in its clipping."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: dict[str, Tensor] = {}
        """The gradients of a step's backward passes."""
        self.hooks: list[RemovableHandle] = []

    def open(self) -> None:
        """Begins a step."""
        if not self.hooks:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(True)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._take, name)))

    def _take(self, name: str, parameter: Tensor) -> None:
        found, parameter.grad = parameter.grad, None
        assert found is not None, "a hook after the gradient was accumulated"
        self.sums[name] = self.sums[name].add_(found) if name in self.sums else found

    @contextmanager
    def gradients(self, scale: float) -> Iterator[None]:
        """Ends a step: a context in which ``.grad`` has the means over the processes. scale: of the loss, in fp16."""
        world = collectives.world_size()
        if self.hooks and world > 1:
            zeros = {name: torch.zeros_like(p) for name, p in self.parameters.items() if name not in self.sums}
            self.sums = {name: (self.sums | zeros)[name] for name in self.parameters}  # in one order everywhere
            collectives.all_reduce_(list(self.sums.values()))
        for name, gradient in self.sums.items():
            self.parameters[name].grad = gradient.div_(scale * world) if scale * world != 1 else gradient
        try:
            yield
        finally:
            for name in self.sums:
                self.parameters[name].grad = None
            self.close()

    def close(self, trained: Collection[int] = ()) -> list[str]:
        """Freezes the parameters again, but those trained, by id. Returns the names of these."""
        left = [name for name, parameter in self.parameters.items() if self.hooks and id(parameter) in trained]
        for name, parameter in self.parameters.items() if self.hooks else ():
            parameter.requires_grad_(name in left)
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.sums = [], {}
        return left
