"""Empirical Fisher information: sums of squared gradients per step, micro-batch or sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnext import ops
from cnext.averaging.base import by_kind, match_strides
from cnext.errors import UserError, unknown

Unit = Literal["step", "micro-batch", "sample"]
"""Whose gradient is squared, see `FisherAccumulator`."""
UNITS: tuple[Unit, ...] = get_args(Unit)


def _always() -> bool:
    return True


class FisherAccumulator:
    """F += g^2 for the gradient g of every unit of a step, per parameter.

    Units:
        "step": the gradient that the optimizer uses, as ``.grad`` holds it: accumulated or reduced, one square. One
            pass over the parameters.
        "micro-batch": every backward pass by itself, read by hooks before ``.grad`` sums them, with whatever scale the
            loss has.
        "sample": every sample by itself, the paper's Eq. 2. One more backward pass per sample.

    The square of a mean is not the mean of squares: over a batch of n uncorrelated gradients, F of "step" is 1/n of the
    mean over "sample". F is a sum, so k batches of n samples give the F of one batch of k n for "sample"; for "step"
    they do where ``.grad`` has accumulated to the same; for "micro-batch" they do not. Divide by the number of units
    for a mean.

    Parameters: float32, bfloat16 or float16, of any shape. Memory: the caller's F alone, 4 bytes a parameter; "sample"
    keeps the batch's graph, and one sample's gradients at a time.

    Args:
        unit: one of `UNITS`.

    Raises:
        UserError: the unit is unknown. `open`: a unit other than "step" with several processes. `step`: losses are
            missing, without a graph, or given where the unit takes none; no parameter has had a gradient since `open`.

    Example:
        >>> import torch
        >>> from cnext.averaging import FisherAccumulator
        >>> parameters = {"weight": torch.nn.Parameter(torch.zeros(2))}
        >>> fisher = {"weight": torch.zeros(2)}
        >>> accumulator = FisherAccumulator("step")
        >>> accumulator.open(parameters, fisher)
        >>> parameters["weight"].grad = torch.tensor([1.0, 2.0])
        >>> accumulator.step()
        >>> accumulator.close()
        >>> fisher["weight"]
        tensor([1., 4.])

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 2.
    """

    def __init__(self, unit: Unit = "step") -> None:
        if unit not in UNITS:
            raise unknown("unit", unit, UNITS)
        self.unit = unit
        self.parameters: Mapping[str, nn.Parameter] = {}
        self.fisher: Mapping[str, Tensor] = {}
        self.active: Callable[[], bool] = _always
        self._hooks: list[RemovableHandle] = []
        self._groups: list[tuple[list[nn.Parameter], ops.Prepared]] = []
        self._seen, self._ever_seen = False, False

    def __copy__(self) -> FisherAccumulator:
        raise UserError("copy.copy of an accumulator would add to the same tensors; use copy.deepcopy, with the model")

    def __getstate__(self) -> dict[str, object]:
        # A copy has other tensors: it prepares its own calls and registers its own hooks.
        return {**self.__dict__, "_groups": [], "_hooks": []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._register()

    def open(
        self,
        parameters: Mapping[str, nn.Parameter],
        fisher: Mapping[str, Tensor],
        active: Callable[[], bool] = _always,
    ) -> None:
        """Starts accumulating.

        Args:
            parameters: the parameters whose gradients are read, by name.
            fisher: F by the same names, float32, of the parameters' shapes and strides; added to in place.
            active: whether the present step counts. A function with a name can be pickled.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.unit != "step" and distributed and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"unit {self.unit!r} reads gradients before their reduction, so ranks would differ; use unit 'step'"
            )
        self.parameters, self.fisher, self.active = parameters, fisher, active
        self._seen, self._ever_seen = False, False
        self._groups = self._prepared() if self.unit == "step" else []
        self._register()

    def has_gradient(self) -> bool:
        """Whether there is a gradient to read. Those of samples are computed by `step`, which checks them."""
        if self.unit == "step":
            return any(parameter.grad is not None for parameter in self.parameters.values())
        return self.unit == "sample" or self._seen

    def step(self, losses: Tensor | None = None) -> None:
        """Accumulates one step, after its backward passes (for the unit "sample", before or after them).

        Args:
            losses: (batch,) the samples' own losses with their graph, for the unit "sample".
        """
        if (losses is not None) != (self.unit == "sample"):
            expected = "the samples' losses, (batch,)" if self.unit == "sample" else "no losses"
            raise UserError(f"unit {self.unit!r} expects {expected}; got {'none' if losses is None else 'losses'}")
        self._ever_seen = self._ever_seen or self.has_gradient()
        self._seen = False
        if not self._ever_seen:
            raise UserError(
                "no parameter has a gradient; expected a step after its backward pass, before the gradients are dropped"
            )
        if losses is not None and not losses.requires_grad:
            raise UserError("the samples' losses have no graph; expected them as the model gave them, not detached")
        if not self.active():
            return
        if losses is not None:
            self._add_samples(losses)
        elif self.unit == "step":
            self._groups = self._groups or self._prepared()
            for parameters, add in self._groups:
                gradients = [parameter.grad for parameter in parameters]
                if any(gradient is not None for gradient in gradients):
                    add(grad=gradients)

    def _add_samples(self, losses: Tensor) -> None:
        trained = self._trained()
        for loss in losses.unbind():
            found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True)
            if all(gradient is None for gradient in found):
                raise UserError("a sample's loss depends on no parameter of the task; expected the losses of its model")
            self._add(dict(zip(trained, found, strict=True)))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def close(self) -> None:
        """Stops accumulating: removes the hooks and drops all references."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._groups, self.parameters, self.fisher, self.active = [], [], {}, {}, _always

    def _register(self) -> None:
        if self.unit == "micro-batch":
            self._hooks = [p.register_hook(self._hook(name)) for name, p in self._trained().items()]

    def _prepared(self) -> list[tuple[list[nn.Parameter], ops.Prepared]]:
        """For each device and dtype, the parameters and the prepared op."""
        return [
            (
                [self.parameters[name] for name in names],
                ops.prepare("fisher_accumulate_", [self.fisher[name] for name in names], None),
            )
            for names in by_kind(self.parameters)
        ]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            self._seen = True
            if self.active():
                self._add({name: gradient})

        return add

    def _add(self, gradients: Mapping[str, Tensor | None]) -> None:
        found = {name: match_strides(g, self.parameters[name]) for name, g in gradients.items() if g is not None}
        for names in by_kind(found):
            ops.fisher_accumulate_([self.fisher[name] for name in names], [found[name] for name in names])
