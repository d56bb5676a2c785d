"""The ops over Kronecker factors as a table, with groups of unequal sizes in both layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from ops.averaging_cases import DEVICE, F32
from torch import Tensor

from cnext import ops
from cnext.ops import kron_reference
from cnext.ops.kron import OPS

NUMBERS: dict[str, dict[str, float]] = {
    "kron_accumulate_": {},
    "kron_pull_": {"weight": 0.7},
    "kron_merge_": {"c": 2.5, "damping": 0.3},
}
GROUPS = [
    (1, [1]),
    (7, [5]),
    (128, [8]),
    (1000, [8, 8, 8, 8]),
    (7, [64]),
    (129, [1, 2, 5, 17]),
    (1000, [30, 34]),
]
"""Rows and ranks of each group."""
Lists = list[list[Tensor]]


@dataclass
class Case:
    """Groups of matrices, and random arguments of every op for them.

    layout: 1 for matrices of (n, rank), 0 for (rank, n), None for both in turn.
    """

    groups: Sequence[tuple[int, list[int]]] = field(default_factory=lambda: GROUPS)
    layout: int | None = None
    dtype: torch.dtype = F32
    seed: int = 0

    def __post_init__(self) -> None:
        self.parts = [len(ranks) for _, ranks in self.groups]
        self.axes = [i % 2 if self.layout is None else self.layout for i in range(sum(self.parts))]

    def inputs(self, name: str) -> Lists:
        """The op's lists: matrices of unit size, and factors that are symmetric to the bit."""
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def one(kind: str) -> list[Tensor]:
            if kind == "rows":
                return [drawn(n).square() * (drawn(n) > -0.8) for n, _ in self.groups]
            if kind == "values":
                return [drawn(sum(ranks)).square() for _, ranks in self.groups]
            if kind == "factor":
                made = [drawn(2 * sum(ranks), sum(ranks)) for _, ranks in self.groups]
                return [(x.T @ x + (x.T @ x).T) / len(x) / 2 for x in made]
            sizes = [(n, rank) for n, ranks in self.groups for rank in ranks]
            return [
                drawn(*(size if axis else size[::-1])).to(self.dtype)
                for size, axis in zip(sizes, self.axes, strict=True)
            ]

        return [[tensor.to(DEVICE) for tensor in one(kind)] for kind in OPS[name].lists.values()]

    def run(self, name: str, lists: Lists, impl: str | None = None, **numbers: float) -> Lists:
        """The op on copies of the lists, which it returns."""
        copies = [[tensor.clone() for tensor in tensors] for tensors in lists]
        getattr(ops, name)(*copies, self.parts, self.axes, **NUMBERS[name] | numbers, impl=impl)
        return copies

    def exact(self, name: str, lists: Lists) -> Lists:
        """The reference in float64 on copies."""
        copies = [[tensor.double().cpu() for tensor in tensors] for tensors in lists]
        getattr(kron_reference, name)(*copies, self.parts, self.axes, **NUMBERS[name])
        return copies
