"""Statistics of beta over groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def pooled(spreads: Mapping[str, tuple[float, float]], group: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and standard deviation over all elements of a group of tensors, from the (mean, std) of each by name."""
    sizes = {name: tensor.numel() for name, tensor in group.items()}
    total = sum(sizes.values())
    mean = sum(sizes[name] * spreads[name][0] for name in group) / total
    square = sum(sizes[name] * (spreads[name][1] ** 2 + spreads[name][0] ** 2) for name in group) / total
    return {"mean": mean, "std": max(square - mean**2, 0.0) ** 0.5}
