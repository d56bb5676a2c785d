"""Reference implementation of `lora_branches` and its dropout mask in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

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
    """The dropout probability in units of 2^-16: an element is dropped where its 16 random bits are below it."""
    return round(dropout * 65536)


def philox(counter: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """The counter-based random generator Philox 4x32 with 7 rounds.

    Args:
        counter: four int64 tensors that broadcast, each value below 2^32.
        seed: (1,) int64, the 64-bit key.

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
    """Low and high 32 bits of a product, from 16-bit halves: the whole product overflows int64."""
    upper, lower = (multiplier >> 16) * word, (multiplier & 0xFFFF) * word
    middle = (upper & 0xFFFF) + (lower >> 16)
    return ((middle & 0xFFFF) << 16) | (lower & 0xFFFF), (upper >> 16) + (middle >> 16)


def dropout_mask(
    seed: Tensor,
    rows: int,
    columns: int,
    dropout: float,
    branch: int = 0,
    *,
    first_row: int = 0,
    first_column: int = 0,
) -> Tensor:
    """(rows, columns) bool, True where an element is kept.

    Row m takes its bits from the counters (16 tile + lane, m, branch, 0), tile = column // 128: column 32 w + 16 t +
    lane of the tile has the lower (t = 0) or upper (t = 1) half of word w, so that lanes of a vector are neighbours.

    Args:
        seed: (1,) int64.
        branch: 0 where the mask is shared, else the branch's number.
        first_row, first_column: position of these elements in a larger matrix; the column is a multiple of 128.
    """
    tiles = -(-columns // TILE)
    lane = first_column // TILE * LANES + torch.arange(tiles * LANES, device=seed.device).view(1, tiles, LANES)
    row = first_row + torch.arange(rows, device=seed.device).view(rows, 1, 1)
    words = philox((lane, row, torch.full_like(row, branch), torch.zeros_like(row)), seed)
    halves = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
    bits = torch.stack(halves, 2).reshape(rows, tiles * TILE)[:, :columns]
    return bits >= threshold(dropout)


def dropped(x: Tensor, dropout: float, seed: Tensor | None, branch: int) -> Tensor:
    """drop(x) for x (rows, columns), differentiable."""
    if not dropout:
        return x
    assert seed is not None, "lora_branches_grouped draws one"
    rows, columns = x.shape
    keep = dropout_mask(seed, rows, columns, dropout, branch)
    return torch.where(keep, x * (65536 / (65536 - threshold(dropout))), 0.0)


def lora_branches(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
) -> list[Tensor]:
    """See `cnext.ops.lora_branches_grouped`. Gradients of any order, by autograd."""
    outputs = []
    flat = x.reshape(-1, x.shape[-1])
    for weight, bias, downs, ups in zip(weights, biases, a, b, strict=True):
        out = ups[0].shape[0]
        offset = flat.new_zeros(out) if bias is None else bias
        y = offset if weight is None else F.linear(flat, weight, bias)
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            kept = dropped(flat, dropout, seed, i if independent else 0)
            term = F.linear(F.linear(kept, down.to(x.dtype)), up.to(x.dtype)) * scale
            y = y + (term if routing is None else term * routing.reshape(-1, len(downs))[:, i : i + 1].to(x.dtype))
        outputs.append(y.reshape(*x.shape[:-1], out))
    return outputs
