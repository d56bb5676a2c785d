"""The visual encoder of Qwen-VL, a ViT-bigG: 448 x 448 pixels to 256 features."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.seed_x.resampler import Resampler, resized
from cnext.backbones.seed_x.sizes import SIDE, TOKENS, VisionSizes

HEADS = 16
EPS = 1e-6
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VIEWS = 32
"""Views per forward pass."""


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (N, 3, H, W) uint8, normalized to float32 by CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def pooled(features: Tensor) -> Tensor:
    """Mean-pools each four successive features: (N, 256, width) to (N, 64, width), the targets of images to write."""
    return features.unflatten(1, (TOKENS, -1)).mean(2)


class Attention(nn.Module):
    """Self-attention with q, k and v packed by head: in_proj gives those of the first head, then of the second, ..."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, EPS)
        self.ln_2 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width)
        wide, narrow = nn.Linear(width, mlp), nn.Linear(mlp, width)
        layers: dict[str, nn.Module] = {"c_fc": wide, "gelu": nn.GELU(), "c_proj": narrow}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisualEncoder(nn.Module):
    """ViT without class token, followed by a resampler, a norm and a projection. Parameter names as released.

    Reference: Qwen-VL, arXiv 2308.12966.
    """

    def __init__(self, sizes: VisionSizes) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, sizes.width, sizes.patch, sizes.patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.positions, sizes.width))
        self.ln_pre = nn.LayerNorm(sizes.width, EPS)
        blocks = nn.ModuleList(Block(sizes.width, sizes.mlp) for _ in range(sizes.layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.attn_pool = Resampler(sizes.queries, sizes.output, sizes.width, EPS)
        self.ln_post = nn.LayerNorm(sizes.output, EPS)
        self.proj = nn.Parameter(torch.zeros(sizes.output, sizes.output))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (N, 3, 448, 448) to features (N, 256, output), in the parameters' dtype."""
        x = self.conv1(pixels.to(self.proj.dtype)).flatten(2).mT
        x = self.ln_pre(x + resized(self.positional_embedding, x.shape[1]))
        for block in self.transformer["resblocks"].children():
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, 448, 448) uint8 on any device to features (N, 256, output), in chunks and without autocast."""
        device = self.proj.device
        with torch.autocast(device.type, enabled=False):
            parts = [self(normalized(chunk.to(device))) for chunk in pixels.split(VIEWS)]
        return torch.cat(parts)

    @torch.no_grad()
    def blank(self) -> Tensor:
        """Features (1, 256, output) of an image that is zero after normalization: CLIP's mean colour."""
        with torch.autocast(self.proj.device.type, enabled=False):
            return self(self.proj.new_zeros(1, 3, SIDE, SIDE))
