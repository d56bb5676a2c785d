"""The adapter linear layer: a frozen linear layer and any number of low-rank branches, summed with equal weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Branch(nn.Module):
    """One low-rank branch. A: (rank, in_features), B: (out_features, rank), both of the base weight's device."""

    def __init__(self, a: Tensor, out_features: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out_features, a.shape[0]))


class AdapterLinear(nn.Module):
    """y = W x + b + scale * sum over branches of B_i A_i drop(x), with W and b frozen.

    The branches' products are formed as one product of rank sum(r_i): four branches of rank 8 cost what one of rank
    32 costs. A branch whose parameters are frozen still adds to y. One dropout mask is shared by all branches.

    Args:
        base: the frozen linear layer, (..., in_features) to (..., out_features).
        branches: name to branch, in the order of summation.
        scale: alpha / total rank; 1.0 in the paper.
        dropout: probability of dropping an element of x on the way into the branches, in training only.

    Reference: Continual-NExT, arXiv 2602.18055, Eq. 1.
    """

    def __init__(self, base: nn.Linear, branches: dict[str, Branch], scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleDict(branches)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        branches = self.branches.values()
        a = torch.cat([branch.A for branch in branches])
        b = torch.cat([branch.B for branch in branches], 1)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + self.scale * F.linear(F.linear(dropped.to(a.dtype), a), b).to(x.dtype)
