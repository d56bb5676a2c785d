"""A router that reads what each position of the forward pass is for, and nothing of its content."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class ByPosition:
    """w = table[role of the position]: every layer's router in turn gets the same tensor, made once per forward pass.

    Args:
        positions: gives (batch, length) int64, what every position of the pass under way is for; a new tensor for
            every pass, never one changed in place.
        table: (roles, branches) weight of every branch at positions of a role.
    """

    def __init__(self, positions: Callable[[], Tensor | None], table: Tensor) -> None:
        self.positions, self.table = positions, table
        self._seen: Tensor | None = None
        self._weights = table

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, length, branches) weights for x, (batch, length, in)."""
        positions = self.positions()
        assert positions is not None, "the backbone says what its positions are for before each pass"
        if positions is not self._seen:
            self._seen, self._weights = positions, self.table.to(positions.device)[positions]
        return self._weights
