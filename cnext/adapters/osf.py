"""Orthogonal subspace layers: the low singular directions of frozen weights, trained apart from the high ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.adapters.attach import trained_like
from cnext.adapters.bases import has_own_forward, is_transposed, is_wrapped, offloaded_to, sizes
from cnext.adapters.targets import linear_targets
from cnext.distributed.processes import whole
from cnext.errors import UserError


class OsfLayer(nn.Module):
    """The trained part of one frozen weight W, split by a singular value decomposition of what it has become.

    W + D = sum over i of s_i u_i v_i^T, singular values descending, min(out, in) of them. The last ``rank`` of these
    triples start U (out, rank), S (rank,) and V (rank, in), which are trained, and

        y = W x + D x + U diag(S) V x - U_0 diag(S_0) V_0 x

    with D the sum of earlier tasks' changes and U_0, S_0, V_0 the starting values. All triples but the last ``live``
    are the high directions H: `project` takes them out of a change of U and V, and freezes the columns of U that are
    among them.

    Args:
        base: the linear layer, whose weight is W, or W^T where it is a Conv1D. Not changed.
        rank: triples in U, S and V.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = (base,)
        """In a tuple, so that it is no part of this module."""
        width, out = sizes(base)
        self.rank = min(rank, out, width)
        weight = base.get_parameter("weight")
        zeros = trained_like(torch.zeros((), device=weight.device), weight)
        self.U = nn.Parameter(zeros.new_zeros(out, self.rank))
        self.S = nn.Parameter(zeros.new_zeros(self.rank))
        self.V = nn.Parameter(zeros.new_zeros(self.rank, width))
        self.merged: Tensor | None = None
        """D; None for zero."""
        self.high: tuple[Tensor, Tensor] = (self.U.detach()[:, :0], self.V.detach()[:0])
        self.start: tuple[Tensor, Tensor, Tensor] = (self.U.detach(), self.S.detach(), self.V.detach())
        self.live = self.rank

    @torch.no_grad()
    def split(self, live: int, restart: bool = True) -> None:
        """Decomposes W + D. live: number of the last triples that may change.

        restart: start U, S and V from it; else they keep the values that they have.
        """
        (base,) = self.base
        weight = whole(base.get_parameter("weight"))
        current = (weight.T if is_transposed(base) else weight).to(self.U.device, torch.float64)
        u, s, v = torch.linalg.svd(current if self.merged is None else current + self.merged, full_matrices=False)
        # A triple has either sign: the largest number of u becomes positive, whatever rounding or the library prefer.
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        u, v = u * signs, v * signs.T
        self.live, kept = live, len(s) - self.rank
        self.high = u[:, : len(s) - live].to(self.U.dtype), v[: len(s) - live].to(self.U.dtype)
        self.start = tuple(part.to(self.U.dtype).contiguous() for part in (u[:, kept:], s[kept:], v[kept:]))  # type: ignore[assignment]
        if restart:
            for parameter, value in zip((self.U, self.S, self.V), self.start, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def merge(self, live: int) -> None:
        """Adds the change of U, S and V to D, and splits the weight anew. The layer's output stays as it is."""
        u, s, v = self.start
        change = (self.U * self.S) @ self.V - (u * s) @ v
        self.merged = change if self.merged is None else self.merged + change
        self.split(live)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to W x, (..., out) of x (..., in), in the parameters' dtype unless under autocast."""
        x = x.to(self.U.dtype)
        u, s, v = self.start
        # Two products alike, which cancel to the bit at the start.
        y = F.linear(F.linear(x, self.V), self.U * self.S) - F.linear(F.linear(x, v), u * s)
        return y if self.merged is None else y + F.linear(x, self.merged)

    def project(self, u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Changes of U, S and V, without their part along the high directions: u - H_u H_u^T u, and v - v H_v^T H_v.

        Those of triples that are not live become zero.
        """
        high_u, high_v = self.high
        live = (torch.arange(self.rank, device=u.device) >= self.rank - self.live).to(u.dtype)
        return (u - high_u @ (high_u.T @ u)) * live, s * live, (v - (v @ high_v.T) @ high_v) * live[:, None]


def attach_osf(model: nn.Module, targets: Sequence[str] | str, rank: int) -> dict[str, OsfLayer]:
    """Puts an `OsfLayer` beside every linear layer whose name ends in a target, and freezes the model.

    Args:
        model: gets a hook on each of these layers, and is otherwise unchanged.
        targets: as of `cnext.adapters.attach`.
        rank: triples of each weight that may be trained, at most.

    Returns:
        The layers by name, not yet split: they add nothing.

    Raises:
        UserError: targets that match no linear layer, or a weight whose singular vectors cannot be computed.
    """
    found: dict[str, Any] = dict(linear_targets(model, targets))
    for name, base in found.items():
        if has_own_forward(base) or is_wrapped(base.weight) or offloaded_to(base) is not None:
            raise UserError(
                f"orthogonal subspaces need the singular vectors of {name}, whose weight is quantized or offloaded; "
                "load the model in bfloat16 or float32 without offloading, or use a method with low-rank branches"
            )
    model.requires_grad_(False)
    made = {name: OsfLayer(base, rank) for name, base in found.items()}
    for name, layer in made.items():
        found[name].register_forward_hook(partial(_add, layer))
    return made


def _add(layer: OsfLayer, base: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + layer(inputs[0]).to(output.dtype)
