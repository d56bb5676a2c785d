"""The released filter of images by size."""

from __future__ import annotations

from pathlib import Path

from cnext.image_files import image_size

LEAST_SIDE, LEAST_RATIO = 400, 0.6
"""The released limits of images to edit: pixels of the shorter side, and its ratio to the longer one."""


def unfit(path: Path) -> str:
    """The size of an image that the released code leaves out of training for editing; "" for other images.

    Asked of the image that is read alone, which is kept if its shorter side has 400 pixels or more, and
    0.6 <= height / width <= 1 / 0.6.
    """
    width, height = image_size(path)
    if min(width, height) >= LEAST_SIDE and LEAST_RATIO <= height / width <= 1 / LEAST_RATIO:
        return ""
    return f"{width}x{height}"
