"""KeepLoRA: a LoRA for every task, inside what neither the pretrained weights nor earlier tasks' inputs occupy.

With M (in, k) an orthonormal basis of a layer's protected input directions and G = dL/dW the task's gradient of the
frozen weight, A is fixed at the task's start, and B alone is trained, from zero:

    A = the leading right singular vectors of G (I - M M^T)        W <- W + scale B A

so that B A M = 0: a protected input gives what it gave before. M starts with the principal subspace of W, the leading
right singular vectors with a share of its squared norm. After a task, with R = sum of x x^T over its inputs, M is
extended by leading eigenvectors of (I - M M^T) R (I - M M^T) until trace(M^T R M) >= features trace(R).

From the paper and its code: all of the above. Decided here: G is the sum over the first steps of the task, in which
nothing else is learnt, and R that over the last steps, as training sees each sample once (the paper passes over the
data again for each); directions in which G (I - M M^T) vanishes are left empty; earlier branches stay beside W instead
of in it, which gives the same output; and the shares, which the paper sets for CLIP and LLaVA.

Reference: Luo et al., KeepLoRA, arXiv 2601.19659.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnext.adapters.attach import fix_a
from cnext.adapters.subspace import InputSubspaces, extended
from cnext.distributed import collectives
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.parts.branches import TaskBranches
from cnext.tasks.base import Task

NOTHING = 1e-5
"""Singular values below this share of a gradient's norm are rounding."""


def residual_directions(gradient: Tensor, basis: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of G (I - M M^T), as rows; zero rows where it has fewer.

    Args:
        gradient: G, (out, in).
        basis: M, (in, k), orthonormal.
        rank: number of rows.

    Returns:
        (rank, in), in the dtype of G. Computed in float64.
    """
    g, m = gradient.double(), basis.double()
    rest = g - (g @ m) @ m.T
    _, values, rows = torch.linalg.svd(rest, full_matrices=False)
    rows = rows[:rank] - (rows[:rank] @ m) @ m.T
    # A singular vector has either sign: its largest number becomes positive, whatever rounding or the library prefer.
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    rows = rows * signs * (values[:rank, None] > NOTHING * g.norm())
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])]).to(gradient.dtype)


@dataclass
class KeepLora(TaskBranches):
    """y = W x + scale * sum over the tasks so far of B_i A_i x, with A_i fixed and A_i M_i = 0."""

    principal: Annotated[float, "Share of a pretrained weight's squared norm that its protected subspace contains."] = (
        0.3
    )
    features: Annotated[float, "Share of a task's inputs' squared norm that the protected subspace contains."] = 0.9
    estimate: Annotated[int, "Steps at a task's start that estimate its gradient: at most an eighth of them."] = 4
    batches: Annotated[int, "Steps at the end of a task whose inputs are counted."] = 16

    card = Card(
        "arXiv 2601.19659",
        keeps="a branch for every task, and a basis of each layer's protected inputs",
        grid={"scale": (1.0, 3.0, 6.0), "principal": (0.3, 0.8), "features": (0.5, 0.9)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.principal <= 1 and 0 <= self.features <= 1 <= min(self.estimate, self.batches)):
            raise UserError(
                "keep-lora: expected shares principal and features from 0 to 1, and estimate and batches of at least "
                f"1, got {self.principal}, {self.features}, {self.estimate} and {self.batches}"
            )
        self.step, self.window, self.first = 0, 0, 0
        self.gradients: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        self.inputs = InputSubspaces(self.model)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        """A is written once, and not trained: without a gradient the optimizer leaves it alone."""
        parameters = super().trainable(task)
        fix_a(parameters)
        return parameters

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.downs: dict[str, Any] = {
            name: layer.branches[self.active[-1]].A for name, layer in self.inputs.layers.items()
        }
        self.step, self.gradients = 0, {}
        self.window, self.first = min(self.estimate, max(1, steps // 8)), steps - self.batches

    def _protect_weight(self, name: str, layer: Any) -> None:
        """Starts a layer's basis with the principal subspace of its weight."""
        if (weight := layer.dense_weight) is None:
            raise UserError(
                f"keep-lora needs the singular vectors of {name}, whose weight is quantized or offloaded; load the "
                "model in bfloat16 or float32 without offloading, or use --method pgp, which protects inputs alone"
            )
        w = weight.detach().float()
        self.inputs.basis[name] = extended(w.new_empty(w.shape[1], 0), w.T @ w, self.principal)

    def before_step(self, batch: Sequence[Any]) -> None:
        if self.step < self.window and not self.handles:
            self.found = {
                name: torch.zeros(layer.out_features, layer.in_features, device=self.downs[name].device)
                for name, layer in self.inputs.layers.items()
            }
            for name, layer in self.inputs.layers.items():
                self.handles.append(layer.register_forward_hook(partial(self._watch, name)))
        if self.step >= self.first:
            self.inputs.watch()

    def _watch(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in self.inputs.basis:  # here, as a sharded weight is whole in a forward pass alone
            self._protect_weight(name, layer)
        if output.requires_grad:
            output.register_hook(partial(self._add, name, inputs[0].detach()))

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Adds dL/dW = sum over positions of dL/dy x^T."""
        self.found[name] += gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()

    @torch.no_grad()
    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        if self.step >= self.window:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        collectives.all_reduce_(list(self.found.values()))
        self.gradients = {name: found + self.gradients.get(name, 0.0) for name, found in self.found.items()}
        for parameter in parameters.values():
            parameter.grad = None
        if self.step + 1 == self.window:
            for name, down in self.downs.items():
                down.copy_(residual_directions(self.gradients[name], self.inputs.basis[name], self.rank))
            self.gradients = {}

    def after_step(self) -> None:
        self.inputs.unwatch()
        self.step += 1

    def after_task(self) -> dict[str, Any] | None:
        self.inputs.extend(self.features)

    def extra_bytes(self, tasks: int) -> int:
        return super().extra_bytes(tasks) + self.inputs.bytes_after(tasks)

    def state_dict(self) -> dict[str, Tensor]:
        gradients = {f"gradient.{name}": gradient for name, gradient in self.gradients.items()}
        return super().state_dict() | {"step": torch.tensor(self.step)} | gradients | self.inputs.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.step = int(state["step"])
        self.gradients = {
            name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith("gradient.")
        }
        kinds = ("extended", "basis.", "covariance.")
        self.inputs.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith(kinds)})
