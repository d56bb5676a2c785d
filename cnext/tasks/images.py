"""Whether an image file is there and can be read."""

from __future__ import annotations

from pathlib import Path

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What an image may be, whatever its file is called. Some other formats are programs, which Pillow has others run."""
LEAST_SIDE, LEAST_RATIO = 400, 0.6
"""The released limits of pictures to edit: pixels of the shorter side, and what it is of the longer one."""


def fault(path: Path, decode: bool = False) -> str:
    """What is wrong with an image: "missing", "broken (why)", or "" where it can be read.

    Args: decode: decode every pixel, which finds a JPEG cut short; else the header and, where the format has them, the
        checksums are looked at.
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
    """The size of a picture that the released code leaves out of training where pictures are edited; "" of others.

    A picture stays where its shorter side has 400 pixels or more, and 0.6 <= height / width <= 1 / 0.6.
    """
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    if min(width, height) >= LEAST_SIDE and LEAST_RATIO <= height / width <= 1 / LEAST_RATIO:
        return ""
    return f"{width}x{height}"
