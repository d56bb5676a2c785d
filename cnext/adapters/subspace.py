"""Subspaces of the inputs of adapter layers, for gradient projection onto their orthogonal complement."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cnext.adapters.attach import layers
from cnext.distributed import collectives


def extended(basis: Tensor, covariance: Tensor, share: float) -> Tensor:
    """Extends an orthonormal basis by the fewest directions with which it explains a share of a covariance.

    R' = (I - U U^T) R (I - U U^T);  U <- [U, leading eigenvectors of R'] until trace(U^T R U) >= share trace(R).

    Args:
        basis: U, (in, k) float32; k may be 0.
        covariance: R, (in, in) float32, symmetric.
        share: from 0 to 1.

    Returns:
        (in, k') float32, k <= k' <= in. Computed in float64.

    Reference: Saha et al., Gradient Projection Memory, arXiv 2103.09762.
    """
    u, r = basis.double(), covariance.double()
    rest = r - u @ (u.T @ r)
    rest -= (rest @ u) @ u.T
    values, vectors = torch.linalg.eigh(rest)
    unexplained = rest.trace() - torch.cat([values.new_zeros(1), values.flip(0).cumsum(0)])
    count = int((unexplained > (1 - share) * r.trace()).sum())
    return torch.cat([u, vectors.flip(1)[:, : min(count, len(r) - u.shape[1])]], 1).to(basis.dtype)


class InputSubspaces:
    """A basis U (in, k) per adapter layer of a model, of the inputs observed between `watch` and `unwatch`.

    ``covariance``: R = sum of x x^T since the last `extend`, (in, in) float32 per layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = layers(model)
        self.basis: dict[str, Tensor] = {}
        self.covariance: dict[str, Tensor] = {}
        self.extended = 0
        """Number of calls of `extend`."""

    def watch(self) -> None:
        """Observes the inputs of forward passes from now on."""
        for name, layer in self.layers.items():
            layer.observer = partial(self._observe, name)

    def unwatch(self) -> None:
        """Stops observing."""
        for layer in self.layers.values():
            layer.observer = None

    def _observe(self, name: str, x: Tensor) -> None:
        x = collectives.all_gather(x.detach().flatten(0, -2).float())
        self.covariance[name] = self.covariance.get(name, 0.0) + x.T @ x

    def extend(self, share: float) -> None:
        """Extends every basis by what it does not explain of the inputs observed, see `extended`, and clears them."""
        for name, covariance in self.covariance.items():
            self.basis[name] = extended(self.basis.get(name, covariance[:, :0]), covariance, share)
        self.covariance = {}
        self.extended += 1

    def inside(self, name: str, rows: Tensor) -> Tensor:
        """Projection of rows (n, in) onto the subspace of a layer."""
        return (rows @ self.basis[name]) @ self.basis[name].T

    def bytes_after(self, times: int) -> int:
        """Bytes of the bases after ``times`` calls of `extend`: exact for past calls, an upper bound for future ones,
        whose inputs are unknown."""
        if times <= self.extended:
            return sum(4 * basis.numel() for basis in self.basis.values())
        return sum(4 * layer.in_features**2 for layer in self.layers.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors "extended", "basis.<layer>", and "covariance.<layer>" of inputs since the last `extend`."""
        slots = {"basis": self.basis, "covariance": self.covariance}
        kept = {f"{kind}.{name}": tensor for kind, slot in slots.items() for name, tensor in slot.items()}
        return kept | {"extended": torch.tensor(self.extended)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.extended = int(state["extended"])
        slots = {"basis": self.basis, "covariance": self.covariance}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if name:
                slots[kind][name] = tensor.to(next(self.layers[name].adapter_parameters())[1].device)
