"""The images that a row names, under the keys and in the marks that other tools write; what would be lost is refused.

An image is named by a field (`KEYS`), by a part of a message, or in a text as Qwen-VL writes it, ``<img>path</img>``.
``<image>`` in a text is the place of the next image that a field names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from cnext.tasks.rows import Row, inside

MARK = "<image>"
KEYS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs", "img_path"),
    *("picture", "pictures", "image_list"),
)
"""Fields that name the image to read, without regard to case; the first that names one is read."""
READ = frozenset(
    "id question_id data text answer answer_bbox size conversations messages system instruction instruction_new "
    "response input output history source_image target_image".split()
)
"""Fields that readers read; in their texts an image's name is a word."""
_KIND = r"(image|img|picture|pic|photo|video|audio)s?"
_LIKE_IMAGE = re.compile(rf"{_KIND}_?(\d+|(path|file|filename|name|ur[il]|bytes|base64|b64|data|list|src|values)s?)?")
_FILE = re.compile(
    r"[^\n]{0,1000}\.(jpe?g|png|webp|bmp|gif|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac)(\?[^\n]*)?|data:image.*",
    re.IGNORECASE | re.DOTALL,
)
_SLOT = re.compile(r"(?:Picture \d+:\s*)?<img>(?P<path>[^<>\n]*)</img>|<image>")
_NO_IMAGE = ("", "none", "null")


class Slot(NamedTuple):
    """The place of an image: the index of a text, and the path that the text itself names, or None."""

    text: int
    path: Path | None


def tag(path: str) -> str:
    """An image in a text, by its path."""
    if set("<>\n") & set(path):
        raise ValueError(f"names an image with <, > or a line break in its path: {path!r}; rename it")
    return f"<img>{path}</img>"


def slots(texts: Sequence[str], root: Path) -> list[Slot]:
    """The places of images in some texts, in order."""
    return [
        Slot(index, None if found["path"] is None else inside(found["path"], root, "<img>"))
        for index, text in enumerate(texts)
        for found in _SLOT.finditer(text)
    ]


def without_slots(text: str) -> tuple[str, bool]:
    """A text without the places of images, and whether the image comes before it, or after it."""
    marked = _SLOT.sub(MARK, text)
    if MARK not in marked:
        return text, True
    bare = marked.replace(MARK, "").strip()
    return bare, not marked.strip().endswith(MARK) or not bare


def placed(texts: Sequence[str], named: Sequence[Path], root: Path) -> dict[int, Path]:
    """The images of a conversation by the index of their text: 0, the first question, or 1, its answer.

    Args:
        texts: question, answer, question, answer, ...
        named: images that fields name, in order. One without a place belongs to the first question.
    """
    found = slots(texts, root)
    # An image that is named by a text and by a field is one.
    waiting = [path for path in named if path not in {slot.path for slot in found}]
    if not found and len(waiting) == 1:
        found = [Slot(0, None)]
    marks = sum(slot.path is None for slot in found)
    if marks != len(waiting):
        raise ValueError(f"has {marks} {MARK} for {len(waiting)} images")
    remaining = iter(waiting)
    images = [(slot.text, slot.path or next(remaining)) for slot in found]
    if len(dict(images)) < len(images) or any(text > 1 for text, _ in images):
        raise ValueError(f"has {len(images)} images; the first question may read one, and the first answer write one")
    return dict(images)


def named(row: Row, root: Path) -> list[Path]:
    """The images that a row's fields name: those of the first field of `KEYS` that names any.

    Raises:
        ValueError: a field that is no path, or other fields that name other images, or one where none is read.
    """
    keys = sorted((key for key in row if _plain(key) in KEYS), key=lambda key: KEYS.index(_plain(key)))
    images: list[Path] = []
    for key in keys:
        images = images or [inside(path, root, key) for path in _paths(row[key], key) if not _no_image(path, root)]
    refuse_others(row, images, keys)
    return images


def named_one(row: Row, root: Path, needed: bool = False) -> Path | None:
    """The only image that a row's fields name, or None. needed: whether it must name one."""
    found = named(row, root)
    if len(found) > 1 or (needed and not found):
        raise ValueError(f"must name one image in 'image', names {len(found)}; it has: {', '.join(sorted(row))}")
    return found[0] if found else None


def refuse_others(row: Row, images: Sequence[Path], keys: Collection[str]) -> None:
    """Raises ValueError where a field that no reader reads names another image than those of the row.

    A row with an image may have other paths and addresses beside it, but none under a key that is an image's.

    Args:
        images: those that are read.
        keys: fields of `KEYS` and `READ` to look at as well.
    """
    names = {path.stem for path in images}
    for key in row:
        like_image = _LIKE_IMAGE.fullmatch(_plain(key)) is not None
        for value in _strings(row[key]) if key in keys or _plain(key) not in {*KEYS, *READ} else ():
            is_file = _FILE.fullmatch(value) is not None
            if images:
                lost = like_image and is_file and PurePath(value).stem not in names and "://" not in value
            else:
                lost = is_file or (like_image and value.lower() not in _NO_IMAGE)
            if lost and not (is_file and PurePath(value).stem.lower() == "null"):
                shown = value if len(value) <= 80 else f"{value[:80]}..."
                raise ValueError(f"names an image that is not read, in {key!r}: {shown}; name it in 'image'")


def _plain(key: str) -> str:
    return key.lower().replace("-", "_").replace(" ", "_")


def _paths(value: Any, key: str) -> list[str]:
    """The paths in a field: a string, a list, or an object with a path, as ``datasets`` writes it."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.get("bytes"):
        return [value["path"]]
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of paths, got {type(value).__name__}")
    if any(isinstance(item, list) for item in value):
        raise ValueError(f"{key!r} must be a list of paths, got lists in it")
    try:
        return [path for item in value for path in _paths(item, key)]
    except ValueError as error:
        raise ValueError(f"{key!r} must be a list of paths: {error}") from error


def _no_image(value: str, root: Path) -> bool:
    """Whether a value says that there is no image: "", "none", "null", or as released a file null.* that is missing."""
    if value.strip().lower() in _NO_IMAGE:
        return True
    return PurePath(value).stem.lower() == "null" and not os.path.isfile(root / value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
