"""Checks of image files: whether they can be read, and the released filter by size."""

from __future__ import annotations

from pathlib import Path

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Accepted formats, whatever a file's suffix. Some other formats are programs, which Pillow passes to interpreters."""
LEAST_SIDE, LEAST_RATIO = 400, 0.6
"""The released limits of images to edit: pixels of the shorter side, and its ratio to the longer one."""


def fault(path: Path, decode: bool = False) -> str:
    """What is wrong with an image: "missing", "broken (why)", or "" if it can be read.

    Args:
        decode: decode every pixel, which detects a truncated JPEG; otherwise only the header and, where the format has
            them, checksums are checked.
    """
    from PIL import Image

    try:
        if not path.is_file():
            return "missing"
        with Image.open(path, formats=FORMATS) as image:
            if decode:
                image.load()
            else:
                image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"broken ({error})"
    return ""


def unfit(path: Path) -> str:
    """The size of an image that the released code leaves out of training for editing; "" for other images.

    An image is kept if its shorter side has 400 pixels or more, and 0.6 <= height / width <= 1 / 0.6.
    """
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    if min(width, height) >= LEAST_SIDE and LEAST_RATIO <= height / width <= 1 / LEAST_RATIO:
        return ""
    return f"{width}x{height}"
