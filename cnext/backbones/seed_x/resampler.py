"""The resampler of Qwen-VL: learned queries cross-attend to features, with 2-D positions on both sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 32


def sinusoids(grid: int, width: int) -> Tensor:
    """Position embeddings (grid * grid, width) float32 of a square, row by row.

    p = [sin(x w), cos(x w), sin(y w), cos(y w)], w_k = 10000^(-k / (width / 4)), x the column and y the row.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], 1).float()


def resized(table: Tensor, count: int) -> Tensor:
    """Position embeddings (n, width) of a square, interpolated bicubically to those of another, (count, width)."""
    if len(table) == count:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(count)
    square = table.float().T.unflatten(1, (old, old))[None]
    return F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype)


class Resampler(nn.Module):
    """Features (N, n, source) to (N, queries, width), by one cross-attention without residual:

        q = ln_q(query) + p,   kv = ln_kv(kv_proj(x)),   y = attention(q, kv + p', kv)

    with positions p of the queries, and p' the same resized to the n features, which are a square as well.

    Reference: Qwen-VL, arXiv 2308.12966; SEED-X, arXiv 2404.14396.
    """

    pos_embed: Tensor

    def __init__(self, queries: int, width: int, source: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.register_buffer("pos_embed", sinusoids(math.isqrt(queries), width))
        self.kv_proj = nn.Linear(source, width, bias=False)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps)
        self.ln_kv = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        kv = self.ln_kv(self.kv_proj(x.to(self.kv_proj.weight.dtype)))
        q = self.ln_q(self.query) + self.pos_embed
        keys = kv + resized(self.pos_embed, x.shape[1])
        return self.attn(q.to(kv.dtype).expand(len(x), -1, -1), keys.to(kv.dtype), kv, need_weights=False)[0]
