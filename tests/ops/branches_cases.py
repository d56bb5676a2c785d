"""Inputs of the branches op and its float64 oracle, shared by its tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from ops.averaging_cases import DEVICE, IMPLS, INTERPRETED
from torch import Tensor

from cnext import ops
from cnext.ops import branches_reference

WAYS = IMPLS if INTERPRETED else [*IMPLS, "torch", "reference"]
SEED = torch.tensor([-8_161_640_532_671_778], device=DEVICE)


@dataclass
class Case:
    """One linear layer or several that read the same x; ``live``: per branch, whether A and B want gradients."""

    lead: tuple[int, ...] = (5, 7)
    inner: int = 33
    outer: tuple[int, ...] = (29,)
    ranks: tuple[int, ...] = (8, 8, 8, 8)
    bias: bool = True
    weight: bool = True
    routed: bool = False
    options: dict[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    live: Sequence[bool] = (True,) * 8
    x_live: bool = True

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int, live: bool = False, scale: float = 1.0) -> Tensor:
            value = torch.randn(shape, generator=generator) * scale
            return value.to(self.dtype).to(DEVICE).requires_grad_(live)

        self.x = draw(*self.lead, self.inner, live=self.x_live)
        self.weights = [draw(n, self.inner, scale=self.inner**-0.5) if self.weight else None for n in self.outer]
        self.biases = [draw(n) if self.bias else None for n in self.outer]
        self.a = [[draw(r, self.inner, live=on) for r, on in zip(self.ranks, self.live)] for _ in self.outer]  # noqa: B905
        self.b = [[draw(n, r, live=on) for r, on in zip(self.ranks, self.live)] for n in self.outer]  # noqa: B905
        self.routing = draw(*self.lead, len(self.ranks), live=True) if self.routed else None
        self.grads = [draw(*self.lead, n) for n in self.outer]

    @property
    def leaves(self) -> list[Tensor]:
        parts = [part for parts in (*self.a, *self.b) for part in parts]
        return [leaf for leaf in (self.x, self.routing, *parts) if leaf is not None and leaf.requires_grad]

    def arguments(self) -> tuple[object, ...]:
        return self.x, self.weights, self.biases, self.a, self.b

    def run(self, impl: str | None) -> list[Tensor]:
        """Outputs, then the gradients of the leaves, by the op."""
        return self._results(
            ops.lora_branches_grouped(
                *self.arguments(), routing=self.routing, **self._random(), **self.options, impl=impl
            )
        )

    def plain(self) -> list[Tensor]:
        """The same by the reference and autograd."""
        options = self._random() | self.options
        return self._results(branches_reference.lora_branches(*self.arguments(), routing=self.routing, **options))

    def exact(self) -> list[Tensor]:
        """The reference in float64, from the same inputs."""
        wide = Case.__new__(Case)
        wide.__dict__ = {name: _wide(value) for name, value in self.__dict__.items()}
        return wide.plain()

    def _random(self) -> dict[str, object]:
        return {"seed": SEED} if self.options.get("dropout") else {}

    def _results(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(outputs, self.leaves, self.grads) if self.leaves else ()
        return [tensor.detach() for tensor in (*outputs, *grads)]


def _wide(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return [_wide(item) for item in value] if isinstance(value, list) else value


def saved_by(output: Tensor) -> Iterator[Tensor]:
    """What the graph under an output keeps for its backward pass, without leaves that are parameters."""
    seen, open_nodes = set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        open_nodes += [child for child, _ in node.next_functions]
        yield from (tensor for tensor in getattr(node, "saved_tensors", ()) if tensor is not None)
