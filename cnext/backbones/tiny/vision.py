"""Visual encoder and de-tokenizer of the tiny backbone: images to features and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """The sizes of an embedded backbone.

    side: width and height of an image in pixels.  grid: features per row and column.  width: of a feature.
    hidden, intermediate, layers, heads: of the decoder.
    """

    side: int
    grid: int
    width: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    @property
    def tokens(self) -> int:
        """Features of an image."""
        return self.grid**2


SIZES = Sizes(side=48, grid=4, width=64, hidden=128, intermediate=344, layers=4, heads=4)
WIDTH, GRID = SIZES.width, SIZES.grid


def to_input(images: Tensor) -> Tensor:
    """Images (B, side, side, 3) uint8 to inputs of the encoder, (B, 3, side, side) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Tensor:
    """Outputs of the de-tokenizer, (B, 3, side, side) in [-1, 1], to images (B, side, side, 3) uint8."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class VisualEncoder(nn.Module):
    """(B, 3, 48, 48) to (B, 16, 64): local features of the image, each with zero mean and unit variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, 64, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(64, 96, 3, 3),
            nn.GELU(),
            nn.Conv2d(96, 96, 1),
            nn.GELU(),
            nn.Conv2d(96, WIDTH, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return F.layer_norm(self.layers(pixels).flatten(2).transpose(1, 2), (WIDTH,))


class Detokenizer(nn.Module):
    """(B, 16, 64) features to (B, 3, 48, 48) pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, WIDTH, GRID, GRID))
        self.layers = nn.Sequential(
            nn.Conv2d(WIDTH, 128, 3, 1, 1),
            nn.GELU(),
            nn.ConvTranspose2d(128, 64, 3, 3),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.GELU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        grid = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.layers(grid + self.position)
