"""MoELoRA: four experts of rank 8 and a softmax router over them in every layer, all trained on every task.

The experts have as many parameters as a LoRA of rank 32. The routers, in_features x experts in every layer, are
additional (5.7% on the tiny backbone), as in the paper.

Reference: Liu et al., arXiv 2310.18339; Chen et al., CoIN, arXiv 2403.08350; Continual-NExT, arXiv 2602.18055, Table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank
from cnext.tasks.base import Task


class Router(nn.Module):
    """w = softmax(R x) for every token. weight: R, (experts, in_features), initialized like nn.Linear's."""

    def __init__(self, experts: int, layer: adapters.AdapterLinear, generator: torch.Generator) -> None:
        super().__init__()
        width = layer.in_features
        drawn = torch.empty(experts, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
        self.weight = nn.Parameter(adapters.trained_like(drawn, next(layer.adapter_parameters())[1]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., experts) that sum to 1."""
        return nn.functional.linear(x.to(self.weight.dtype), self.weight).softmax(-1)


@dataclass
class MoeLora(LowRank):
    """y = W x + scale * sum over experts of w_e(x) B_e A_e x, w(x) = softmax(R x)."""

    lr_factor: float = 0.5
    rank: Annotated[int, "Rank of each expert."] = 8
    scale: Annotated[float, "Scaling factor of the experts' weighted mean; 1.0 in the paper."] = 12.0
    experts: Annotated[int, "Number of experts."] = 4

    router: ClassVar[type[Router]] = Router
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"experts": (1, 256)}
    card = Card("arXiv 2310.18339", grid={"scale": (2.0, 6.0, 12.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1:
            raise UserError(f"experts must be at least 1, got {self.experts}")

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        return {f"expert-{index}": self.rank for index in range(self.experts)}

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        super().attach(tasks, generator)
        for layer in adapters.layers(self.model).values():
            layer.router = self.router(self.experts, layer, generator)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        return self.unfreeze(self.adapter_parameters())

    def unfreeze(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Makes exactly these parameters trainable and returns them."""
        self.model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        return parameters

    def extra_bytes(self, tasks: int) -> int:
        return sum(4 * p.numel() for name, p in self.adapter_parameters().items() if ".router." in name)
