"""Whether an image file is there and can be read."""

from __future__ import annotations

from pathlib import Path


def fault(path: Path, decode: bool = False) -> str:
    """What is wrong with an image: "missing", "broken (why)", or "" where it can be read.

    Args: decode: decode every pixel, which finds a JPEG cut short; else the header and, where the format has them, the
        checksums are looked at.
    """
    from PIL import Image

    try:
        if not path.is_file():
            return "missing"
        with Image.open(path) as image:
            if decode:
                image.load()
            else:
                image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"broken ({error})"
    return ""
