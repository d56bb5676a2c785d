"""Visual encoder and de-tokenizer of the small backbone: images to features and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.tiny.vision import Sizes

SIZES = Sizes(side=96, grid=6, width=96, hidden=192, intermediate=512, layers=5, heads=6)


class Block(nn.Module):
    """x + a bottleneck of half the channels, (B, channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.Conv2d(channels, channels // 2, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class VisualEncoder(nn.Module):
    """(B, 3, 96, 96) to (B, 36, 96): features of a grid of 6 x 6, each with zero mean and unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1),
            nn.GroupNorm(8, 32),
            nn.GELU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            Block(64),
            nn.Conv2d(64, 96, 4, 2, 1),
            Block(96),
            nn.GELU(),
            nn.Conv2d(96, 128, 4, 2, 1),
            Block(128),
            Block(128),
            nn.GELU(),
            nn.Conv2d(128, SIZES.width, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return F.layer_norm(self.layers(pixels).flatten(2).transpose(1, 2), (SIZES.width,))


class Detokenizer(nn.Module):
    """(B, 36, 96) features to (B, 3, 96, 96) pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, SIZES.width, SIZES.grid, SIZES.grid))
        self.layers = nn.Sequential(
            nn.Conv2d(SIZES.width, 128, 3, 1, 1),
            Block(128),
            nn.GELU(),
            nn.ConvTranspose2d(128, 80, 4, 2, 1),
            Block(80),
            nn.GELU(),
            nn.ConvTranspose2d(80, 48, 4, 2, 1),
            Block(48),
            nn.GELU(),
            nn.ConvTranspose2d(48, 32, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        grid = features.transpose(1, 2).unflatten(2, (SIZES.grid, SIZES.grid))
        return self.layers(grid + self.position)
