"""Any-resolution image input: an image is split into tiles; the whole image is the last view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnext.backbones.seed_x.sizes import SIDE

if TYPE_CHECKING:
    from PIL.Image import Image

WHOLE = ((1, 1),)
GRIDS = ((1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (1, 4), (4, 1), (2, 2))
"""Columns and rows of tiles that an image may be stretched to."""


def best_grid(width: int, height: int, grids: Sequence[tuple[int, int]] = GRIDS) -> tuple[int, int]:
    """Columns and rows of the grid for an image of that size.

    The smaller of two: the grid that keeps the most pixels, min(area of the image scaled to fit inside, its own area),
    and wastes the fewest; and the grid with the most similar aspect ratio, and among those the most similar area.
    """

    def kept(grid: tuple[int, int]) -> tuple[int, int]:
        columns, rows = grid[0] * SIDE, grid[1] * SIDE
        scale = min(columns / width, rows / height)
        inside = min(int(width * scale) * int(height * scale), width * height)
        return inside, inside - columns * rows

    def mismatch(grid: tuple[int, int]) -> tuple[float, float]:
        columns, rows = grid[0] * SIDE, grid[1] * SIDE
        ratio, area = (columns * height) / (rows * width), (columns * rows) / (width * height)
        return max(ratio, 1 / ratio), max(area, 1 / area)

    by_pixels, by_ratio = max(grids, key=kept), min(grids, key=mismatch)
    return by_ratio if by_pixels[0] * by_pixels[1] > by_ratio[0] * by_ratio[1] else by_pixels


@dataclass(frozen=True)
class Views:
    """The views of an image: tiles row by row, then the whole image.

    pixels: (V, 3, 448, 448) uint8.  centres: (T, 2) float32, x and y of each view's centre in the image, 0 to 1.
    Either V = T, or V = 1 and T = 2: the only tile of a 1 x 1 grid equals the whole image and is encoded once.
    """

    pixels: Tensor
    centres: Tensor


def _pixels(image: Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def whole(image: Image) -> Tensor:
    """The image resized to a square, (3, 448, 448) uint8."""
    return _pixels(image.resize((SIDE, SIDE)))


def views(image: Image, grids: Sequence[tuple[int, int]] = GRIDS) -> Views:
    """The image resized to its `best_grid` and split into tiles, and the whole image."""
    columns, rows = best_grid(*image.size, grids)
    centres = [((column + 0.5) / columns, (row + 0.5) / rows) for row in range(rows) for column in range(columns)]
    pixels = whole(image)[None]
    if columns * rows > 1:
        resized = _pixels(image.resize((columns * SIDE, rows * SIDE)))
        tiles = resized.unflatten(2, (columns, SIDE)).unflatten(1, (rows, SIDE)).permute(1, 3, 0, 2, 4)
        pixels = torch.cat([tiles.flatten(0, 1), pixels])
    return Views(pixels, torch.tensor([*centres, (0.5, 0.5)]))


def patch_features(centres: Tensor) -> Tensor:
    """Features (T, 4) of centres (T, 2): [x, y, 1 - x, 1 - y] / 2."""
    return torch.cat([centres, 1 - centres], 1) / 2
