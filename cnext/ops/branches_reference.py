"""The branches op and its backward in plain torch, one branch after another: the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 7
TILE = 128
LANES = 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def threshold(dropout: float) -> int:
    """Dropout in units of 2^-16: an element is dropped where its 16 random bits are below this."""
    return round(dropout * 65536)


def philox(counter: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox 4x32 with 7 rounds.

    Args:
        counter: four int64 tensors that broadcast, each value below 2^32.
        seed: (1,) int64, the 64 bits of the key.

    Returns:
        Four int64 tensors of 32 random bits each.

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    words = list(torch.broadcast_tensors(*counter))
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        (low0, high0), (low1, high1) = (_product(m, words[i]) for m, i in zip(_MULTIPLIERS, (0, 2), strict=True))
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    return words


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a product, from halves: int64 has no room for its top bit."""
    upper, lower = (multiplier >> 16) * word, (multiplier & 0xFFFF) * word
    middle = (upper & 0xFFFF) + (lower >> 16)
    return ((middle & 0xFFFF) << 16) | (lower & 0xFFFF), (upper >> 16) + (middle >> 16)


def dropout_mask(seed: Tensor, rows: int, columns: int, dropout: float, branch: int = 0) -> Tensor:
    """Which elements are kept, (rows, columns) bool.

    Row m takes its bits from the counters (16 tile + lane, m, branch, 0), tile = column // 128: column 32 w + 16 t +
    lane of the tile has the lower (t = 0) or upper (t = 1) half of word w, so that lanes of a vector are neighbours.

    Args:
        seed: (1,) int64.
        branch: 0 where the mask is shared, else the branch's number.
    """
    tiles = -(-columns // TILE)
    lane = torch.arange(tiles * LANES, device=seed.device).view(1, tiles, LANES)
    row = torch.arange(rows, device=seed.device).view(rows, 1, 1)
    words = philox((lane, row, torch.full_like(row, branch), torch.zeros_like(row)), seed)
    halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    bits = torch.stack(halves, 2).reshape(rows, tiles * TILE)[:, :columns]
    return bits >= threshold(dropout)


def dropped(x: Tensor, dropout: float, seed: Tensor | None, branch: int) -> Tensor:
    """drop(x) for x (rows, columns), and what leads a gradient back through it."""
    if not dropout:
        return x
    assert seed is not None, "drawn where there is dropout"
    rows, columns = x.shape
    keep = dropout_mask(seed, rows, columns, dropout, branch)
    return torch.where(keep, x * (65536 / (65536 - threshold(dropout))), 0.0)


def with_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`lora_branches`, and drop(x) A^T of every branch, side by side: layer by layer, (rows, layers x rank)."""
    outputs, projections = [], []
    flat = x.reshape(-1, x.shape[-1])
    for weight, bias, downs, ups in zip(weights, biases, a, b, strict=True):
        y = F.linear(flat, weight, bias)
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            kept = dropped(flat, dropout, seed, i if independent else 0)
            projections.append(F.linear(kept, down.to(x.dtype)))
            term = F.linear(projections[-1], up.to(x.dtype)) * scale
            y = y + (term if routing is None else term * routing.reshape(-1, len(downs))[:, i : i + 1].to(x.dtype))
        outputs.append(y.reshape(*x.shape[:-1], weight.shape[0]))
    return outputs, torch.cat(projections, 1)


def lora_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    **options: Any,
) -> list[Tensor]:
    """See `cnext.ops.lora_branches`; for every linear layer that reads x its own weight, bias and branches."""
    return with_projections(x, weights, biases, a, b, **options)[0]


def unpacked(a: Tensor, b: Sequence[Tensor], ranks: list[int]) -> tuple[Sequence[Sequence[Tensor]], ...]:
    """Every layer's A and B by branch, from the op's matrices: a (layers x rank, in), and per layer a b (out, rank)."""
    downs = [torch.split_with_sizes(part, ranks) for part in a.chunk(len(b))]
    return downs, [torch.split_with_sizes(part, ranks, 1) for part in b]


def lora_branches_backward(
    grads: Sequence[Tensor],
    x: Tensor | None,
    projections: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    *,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    independent: bool,
    routing: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, of every A and every B, layer by layer, and of every branch's routing, summed over the layers.

    What autograd through `lora_branches` gives, by hand: an op cannot call autograd wherever it may be called.

    Args:
        x: None where no gradient of an A is wanted; the list is empty.
        projections: as `with_projections` gives them. None: no gradients of B and of the routing.
    """
    rows = grads[0].shape[:-1].numel()
    dx = grads[0].new_zeros(rows, weights[0].shape[1])
    da, db, d_routing = [], [], [grads[0].new_zeros(rows) for _ in a[0]]
    h = iter(() if projections is None else projections.split([down.shape[0] for downs in a for down in downs], 1))
    for grad, weight, downs, ups in zip(grads, weights, a, b, strict=True):
        dy = grad.reshape(-1, grad.shape[-1])
        dx = dx + dy @ weight
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            branch = i if independent else 0
            routed = dy if routing is None else dy * routing.reshape(-1, len(downs))[:, i : i + 1].to(dy.dtype)
            dh = (routed @ up) * scale
            dx = dx + dropped(dh @ down, dropout, seed, branch)
            if x is not None:
                da.append(dh.T @ dropped(x.reshape(-1, x.shape[-1]), dropout, seed, branch))
            if projections is not None:
                mine = next(h)
                db.append((routed.T @ mine) * scale)
                d_routing[i] = d_routing[i] + ((dy @ up) * mine).sum(1) * scale
    return dx, da, db, d_routing
