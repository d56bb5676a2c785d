"""The pictures that `next-real` is composed of: drawings of things, photographs, handwritten digits, letters.

All come with the package, in ``material/``; ``LICENSES.md`` there names their sources, and ``bench/real_material.py``
makes them from these. Here they are read, and nothing is composed.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from cnext.errors import parse_json

if TYPE_CHECKING:
    from PIL import Image

FOLDER = Path(__file__).parent / "material"
CELL, CELLS = 64, 10
"""Width and height in pixels of a drawing's cell in a sheet, and cells per row."""
DIGIT, DIGITS_PER_ROW = 8, 60
LETTER, LEFT, MIDDLE = 28, 4, 14
"""Width and height of a letter's cell, its left edge there, and the middle of small letters."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _opened(name: str, mode: str) -> Image.Image:
    from PIL import Image

    return Image.open(FOLDER / name).convert(mode)


def _resized(image: Image.Image, side: int) -> Image.Image:
    from PIL import Image

    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


def _mask(values: numpy.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(values)


def _json(name: str) -> Any:
    return parse_json((FOLDER / name).read_bytes())


@cache
def sources() -> dict[str, Any]:
    """Where everything comes from, with licenses: ``sources.json``."""
    return _json("sources.json")


@cache
def things() -> tuple[str, ...]:
    """The names of the things, in the order of the sheets."""
    return tuple(one["name"] for one in sources()["classes"])


@cache
def styles() -> tuple[str, ...]:
    """The drawing styles; captions are drawn in the first."""
    return tuple(one["name"] for one in sources()["styles"])


@cache
def _sheet(style: str) -> Image.Image:
    return _opened(f"{style}.png", "RGBA")


@lru_cache(maxsize=8192)
def drawing(thing: str, style: str, side: int) -> Image.Image:
    """A thing in a style, RGBA, side x side pixels. Not to be changed."""
    row, column = divmod(things().index(thing), CELLS)
    cell = _sheet(style).crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    return _resized(cell, side)


@lru_cache(maxsize=8192)
def extent(thing: str, style: str, side: int) -> tuple[int, int, int, int]:
    """The box (x1, y1, x2, y2) in pixels of what is not transparent in a `drawing`."""
    visible = numpy.asarray(drawing(thing, style, side))[..., 3] > 64
    (rows,), (columns,) = visible.any(1).nonzero(), visible.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@cache
def photographs(split: str) -> tuple[str, ...]:
    """The names of the photographs of a split: none is in two."""
    return tuple(one["name"] for one in sources()["photographs"] if one["split"] == split)


@cache
def photograph(name: str) -> Image.Image:
    """A photograph, RGB, 144 x 144 pixels."""
    return _opened(f"photographs/{name}.png", "RGB")


@cache
def digit_labels() -> str:
    """The digit that each handwritten one shows."""
    return _json("digits.json")


@cache
def _digits() -> numpy.ndarray:
    return numpy.asarray(_opened("digits.png", "L"))


def digit(index: int, side: int) -> Image.Image:
    """A handwritten digit as a mask, side x side pixels."""
    row, column = divmod(index, DIGITS_PER_ROW)
    cell = _digits()[row * DIGIT : (row + 1) * DIGIT, column * DIGIT : (column + 1) * DIGIT]
    return _resized(_mask(cell), side)


@cache
def fonts() -> tuple[str, ...]:
    """The names of the fonts, in the order of the atlas."""
    return tuple(one["name"] for one in _json("letters.json")["fonts"])


@cache
def _letters() -> tuple[numpy.ndarray, dict[str, Any]]:
    return numpy.asarray(_opened("letters.png", "L")), _json("letters.json")


@lru_cache(maxsize=4096)
def word(text: str, font: str) -> tuple[Image.Image, tuple[float, ...]]:
    """A word in lower-case letters as a mask, 28 pixels high, and the center of each letter in pixels from its left."""
    atlas, table = _letters()
    row = fonts().index(font)
    advances = table["fonts"][row]["advances"]
    places, x = [], 0.0
    for letter in text:
        places.append(round(x))
        x += advances[LETTERS.index(letter)]
    mask = numpy.zeros((LETTER, round(x) + LETTER), dtype=numpy.uint8)
    for letter, left in zip(text, places, strict=True):
        column = LETTERS.index(letter) * LETTER
        cell = atlas[row * LETTER : (row + 1) * LETTER, column : column + LETTER]
        mask[:, left : left + LETTER] = numpy.maximum(mask[:, left : left + LETTER], cell)
    (columns,) = mask.any(0).nonzero()
    widths = (advances[LETTERS.index(letter)] for letter in text)
    centers = (left + LEFT + width / 2 - int(columns[0]) for left, width in zip(places, widths, strict=True))
    return _mask(mask[:, columns[0] : columns[-1] + 1].copy()), tuple(centers)
