"""PGP: LoRA whose A is updated only orthogonally to the subspace of the layer's inputs in earlier tasks.

Where dA x = 0, A maps x to what it did before. With U (in, k) an orthonormal basis of the important input directions so
far and P = I - U U^T, the gradient G of A and then the step itself are projected, so that dA U = 0:

    G <- G P,    and after the optimizer    A <- A_before + (A - A_before) P

Projecting G alone is not enough: Adam rescales it element by element, out of the subspace, and weight decay is not part
of it. After a task, with R = sum of x x^T over its last steps, U is extended by leading eigenvectors of P R P until
trace(U^T R U) >= epsilon trace(R). B is unconstrained. The official code projects prompts instead of A.

Reference: Qiao et al., Prompt Gradient Projection for Continual Learning, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from cnext.adapters.subspace import InputSubspaces
from cnext.errors import UserError
from cnext.methods.base import Card, Memory
from cnext.methods.parts.low_rank import LowRank
from cnext.tasks.base import Task


@dataclass
class Pgp(LowRank):
    """y = W x + scale B A x."""

    epsilon: Annotated[float, "Share of the inputs' squared norm that the protected subspace contains."] = 0.5
    batches: Annotated[int, "Steps at the end of a task whose inputs are counted."] = 16

    card = Card(
        "ICLR 2024, Prompt Gradient Projection",
        keeps="a basis of each layer's protected inputs",
        grid={"scale": (1.0, 3.0, 6.0), "epsilon": (0.5, 0.9, 0.97, 0.99)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1 <= self.batches:
            raise UserError(f"pgp: expected 0 <= epsilon <= 1 <= batches, got {self.epsilon} and {self.batches}")
        self.step = 0

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        self.inputs = InputSubspaces(self.model)

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        self.downs: dict[str, Any] = {name: layer.branches["lora"].A for name, layer in self.inputs.layers.items()}
        self.step, self.first = 0, steps - self.batches

    def before_step(self, batch: Sequence[Any]) -> None:
        self.before = {name: self.downs[name].detach().clone() for name in self.inputs.basis}
        if self.step >= self.first:
            self.inputs.watch()

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        for name in self.before:
            self.downs[name].grad -= self.inputs.inside(name, self.downs[name].grad)

    @torch.no_grad()
    def after_step(self) -> None:
        self.inputs.unwatch()
        for name, before in self.before.items():
            self.downs[name] -= self.inputs.inside(name, self.downs[name] - before)
        self.step += 1

    def after_task(self) -> dict[str, Any] | None:
        self.inputs.extend(self.epsilon)

    def extra_bytes(self, tasks: int) -> int:
        return self.inputs.bytes_after(tasks)

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step), **self.inputs.state_dict()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.inputs.load_state_dict({key: tensor for key, tensor in state.items() if key != "step"})
