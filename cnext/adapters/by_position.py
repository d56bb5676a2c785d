"""Router that weights branches by the role of each position, not by its content."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class ByPosition:
    """w = table[role of the position]. Computed once per forward pass and shared by all layers.

    Args:
        positions: returns `Backbone.positions` of the current pass, (batch, length) int64: a new tensor for every pass,
            never one changed in place.
        table: (roles, branches) weight of each branch at positions of each role.
    """

    def __init__(self, positions: Callable[[], Tensor | None], table: Tensor) -> None:
        self.positions, self.table = positions, table
        self._seen: Tensor | None = None
        self._weights = table

    def __call__(self, x: Tensor) -> Tensor:
        """Weights (batch, length, branches) for x, (batch, length, in)."""
        positions = self.positions()
        assert positions is not None, "the backbone sets its positions before each pass"
        if positions is not self._seen:
            self._seen, self._weights = positions, self.table.to(positions.device)[positions]
        return self._weights
