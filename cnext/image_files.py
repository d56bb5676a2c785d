"""Open image files: the one place where models, scorers, reports, the judge and checks do so.

An image is as a viewer shows it, in 8-bit RGB: upright by its orientation tag, on white where it is transparent, 16
bits a channel scaled to 8, the first of several frames. Refused are other formats than those of `FORMATS`, and pixels
without a black and a white of their own: floating point, 32 bits, signed. Color profiles are not applied.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnext.errors import UserError
from cnext.regular_files import require_regular

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Accepted formats, whatever a file's suffix. Some other formats are programs, which Pillow passes to interpreters."""
FOR_WEB = ("GIF", "JPEG", "PNG", "WEBP")
"""Formats that model servers accept."""
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error)
"""Errors that Pillow raises for damaged files."""
_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339
_SIDEWAYS = 5
_SIGNED = 2
_JPEG_END = b"\xff\xd9"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_TAGS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Texts of a PNG that may have an orientation."""


class Unreadable(UserError):
    """An image that cannot be read. reason: why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"expected an image, but {path} cannot be read: {reason}\n`cnext data check` lists every such file"
        )
        self.reason = reason


@dataclass(frozen=True)
class Inspection:
    """What is known of an image file.

    fault: "missing", "broken (why)", or "" if it can be read.  size: width and height as shown; (0, 0) with a fault.
    converted: what is done to show it; known only where every pixel was decoded.
    """

    fault: str = ""
    size: tuple[int, int] = (0, 0)
    converted: tuple[str, ...] = ()


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """The file as Pillow opens it. Raises Unreadable, also for errors in the ``with`` block."""
    from PIL import Image, UnidentifiedImageError

    try:
        # Of a path, Pillow maps an uncompressed TIFF into memory with the sides of the turned image.
        require_regular(path)
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        kinds = f"{', '.join(FORMATS)} with pixels that Pillow reads"
        raise Unreadable(path, f"cannot identify image file; expected {kinds}: save it as an 8-bit PNG") from error
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise Unreadable(path, str(error) or type(error).__name__) from error


def open_image(path: Path) -> Image:
    """An image as a viewer shows it, in 8-bit RGB. Raises UserError for one that is missing, broken or refused."""
    with _opened(path) as image:
        return _shown(image)[0]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image as shown, from its header. Raises UserError as `open_image`."""
    with _opened(path) as image:
        return _size(image, path)


def inspect(path: Path, decode: bool = True) -> Inspection:
    """Looks for faults in an image file.

    Args:
        decode: decode every pixel. Otherwise the end of a JPEG is checked, which finds files that were not copied to
            their end, and of other images every pixel. A PNG's checksums are checked in both cases.
    """
    try:
        if not path.is_file():
            return Inspection("missing")
        with _opened(path) as image:
            size = None if _tagged_png(image, path) else _size(image, path)
            complete = _complete(image, path)
        if size and complete and not decode:
            return Inspection("", size)
        with _opened(path) as image:
            shown, converted = _shown(image)
            return Inspection("", shown.size, converted)
    except (OSError, Unreadable) as error:
        return Inspection(f"broken ({error.reason if isinstance(error, Unreadable) else error})")


def for_web(path: Path) -> tuple[str, bytes]:
    """An image for a model server, as (format, content): its own bytes where every server shows them as `open_image`
    does, otherwise a PNG of what that returns. Raises UserError as `open_image`."""
    with _opened(path) as image:
        shown, conversions = _shown(image)
        if image.format in FOR_WEB and not conversions:
            return image.format.lower(), path.read_bytes()
    content = io.BytesIO()
    shown.save(content, "PNG")
    return "png", content.getvalue()


def _complete(image: ImageFile, path: Path) -> bool:
    """Whether a file is complete, where that shows without decoding it; a PNG cannot be decoded afterwards. Raises an
    error of `DAMAGED` for a broken PNG, and for pixels that are refused."""
    _require_range(image)
    if image.format == "PNG":
        clear = image.has_transparency_data
        image.verify()
        return not clear
    with path.open("rb") as file:
        file.seek(-len(_JPEG_END), io.SEEK_END)
        return image.format == "JPEG" and file.read() == _JPEG_END


def _require_range(image: ImageFile) -> None:
    """Raises ValueError for pixels whose black and white are not known. The image is not loaded yet."""
    kind = {"I": "32-bit", "F": "floating-point"}.get("" if _deep(image) else image.mode, "")
    if _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED:
        kind = "signed"
    if kind:
        raise ValueError(f"it has {kind} pixels, of which no value is black or white; save it with 8 or 16 bits")
    if image.mode == "RGB" and "transparency" in image.info and any(";16" in str(tile) for tile in image.tile):
        raise ValueError("it has a transparent color of 16 bits a channel; save it with an alpha channel")


def _tag(image: ImageFile, number: int, default: int) -> int:
    """A number in the tags of a TIFF, the first of several; the default for other formats."""
    tags: Any = getattr(image, "tag_v2", {})
    value = tags.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _deep(image: ImageFile) -> bool:
    """Whether an image is gray with more than 8 bits. Older releases of Pillow open such a PNG in mode I."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _shown(image: ImageFile) -> tuple[Image, tuple[str, ...]]:
    """The image as shown, and what was done to it."""
    _require_range(image)
    conversions = [text for text, applies in CONVERSIONS.items() if applies(image)]
    tag = _tag(image, _ORIENTATION, 1)  # which Pillow removes on turning a TIFF
    _scale_key(image)
    image.load()
    if max(tag, _orientation(image)) > 1:
        conversions.append("turned by their orientation tag")
    return _upright(image, _in_rgb(image)), tuple(conversions)


def _scale_key(image: ImageFile) -> None:
    """Scales the transparent gray of a PNG of 1, 2 or 4 bits to 8, as Pillow does its pixels. It is not loaded yet."""
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode in ("1", "L") and isinstance(key, int) and image.tile:
        white = {"1": 1, "L;2": 3, "L;4": 15}.get(str(image.tile[0][3]), 255)
        image.info["transparency"] = (key & white) * 255 // white


def _in_rgb(image: ImageFile) -> Image:
    from PIL import Image

    if _deep(image):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colors = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    if colors.getchannel("A").getextrema()[1] == 0:
        raise ValueError("every pixel is transparent; save it without its alpha channel")
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


CONVERSIONS: dict[str, Callable[[Any], bool]] = {
    "with transparency, put on white": lambda image: image.has_transparency_data,
    "of more than 8 bits, scaled to 8": lambda image: _deep(image) or any(";16" in str(tile) for tile in image.tile),
    "in CMYK, converted to RGB": lambda image: image.mode == "CMYK",
    # The second frame of a camera's MPO is a preview.
    "of several frames, of which the first is read": lambda image: (
        image.format != "MPO" and getattr(image, "is_animated", False)
    ),
}
"""What is done to show an image, and whether it is, by its header."""


def _eight_bits(image: ImageFile) -> numpy.ndarray:
    """A gray image of 12 or 16 bits at 8, (H, W) uint8; white where it is transparent."""
    import numpy

    white = 2 ** _tag(image, _BITS, 16) - 1
    values = numpy.asarray(image).astype(numpy.int64)
    gray = ((values * 255 + white // 2) // white).clip(0, 255).astype(numpy.uint8)
    if _tag(image, _PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow leaves as it is for these depths
        gray = 255 - gray
    return numpy.where(values == image.info.get("transparency", -1), numpy.uint8(255), gray)


def _orientation(image: ImageFile) -> int:
    """The orientation tag, 2 to 8; 1, upright, for every other value, or where the tags are damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except DAMAGED:
        return 1
    return found if found in range(2, 9) else 1


def _upright(image: ImageFile, shown: Image) -> Image:
    """A converted image turned as the orientation tag of its file says."""
    from PIL import ImageOps

    shown.info.clear()
    shown.getexif()[_ORIENTATION] = _orientation(image)
    return ImageOps.exif_transpose(shown)


def _size(image: ImageFile, path: Path) -> tuple[int, int]:
    """Width and height as shown. Pillow swaps those of a TIFF with an orientation tag itself."""
    width, height = image.size
    as_stored = image.format == "PNG" and not _tagged_png(image, path)
    if as_stored or _ORIENTATION in getattr(image, "tag_v2", {}) or _orientation(image) < _SIDEWAYS:
        return (width, height)
    return (height, width)


def _tagged_png(image: ImageFile, path: Path) -> bool:
    """Whether a PNG has tags, before its pixels or behind them; Pillow decodes it to look for them."""
    if image.format != "PNG":
        return False
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            following = file.tell() + length + 4
            if kind == b"eXIf" or (kind in _PNG_TEXTS and file.read(min(length, 40)).startswith(_PNG_TAGS)):
                return True
            file.seek(following)
    return False
