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

from cnext.tasks.kept_images import ImageBytes
from cnext.tasks.rows import Row, inside

MARK = "<image>"
KEYS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "img", "imgs", "img_path"),
    *("picture", "pictures", "image_list"),
)
"""Fields that name the image to read, without regard to case; the first that names one is read."""
READ = frozenset(
    "id question_id data text question answer answers answer_bbox size conversations messages system instruction "
    "instruction_new response input output history".split()
)
"""Fields that readers read as text; an image's name in it is a word."""
_KIND = r"(image|img|picture|pic|photo|video|audio)s?"
_LIKE_IMAGE = re.compile(rf"{_KIND}_?(\d+|(path|file|filename|name|ur[il]|bytes|base64|b64|data|list|src|values)s?)?")
_OTHER_IMAGE = re.compile(r"image|img|picture|photo|video|audio|mask|depth")
"""Keys that may name a further image beside the one that is read."""
_ABOUT = re.compile(r"\D*(?P<kind>name|id|ur[il]|link)s?")
"""Of those, the keys that tell of the image that is read."""
_SUFFIX = (
    r"\.(jpe?g|jpe|jfif|jp2|j2k|png|apng|webp|bmp|gif|tiff?|avif|hei[cf]|p[pgbn]m|svg|tga|ico|psd|exr|hdr|dng"
    r"|mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|m4a|ogg|flac)"
)
_FILE = re.compile(rf"[^\n]{{0,1000}}{_SUFFIX}(\?[^\n]*)?|data:image.*", re.IGNORECASE | re.DOTALL)
_SLOT = re.compile(
    r"(?:Picture \d+:\s*)?<(?P<tag>img|image)>(?P<path>[^<>]*)</(?P=tag)>"
    r"|(?:<\|vision_start\|>)?(?:<image>|<image[_ ]?1>|<\|image(?:_1|_pad)?\|>|<image_?here>|<image_placeholder>"
    r"|<start_of_image>)(?:<\|vision_end\|>)?|(?-i:\[IMG\])",
    re.IGNORECASE,
)
_OTHER_MARK = re.compile(
    r"</?image(?:[_ ]?\d+|_\w+)?>|<im_(?:start|end|patch)>|<img_context>"
    r"|<\|[a-z_]*(?:image|img|vision|video|audio)\w*\|>"
    rf"|\[IMG_\w+\]|<img>\s*[^\s<>]+{_SUFFIX}|(?:^|\n)[ \t]*<(?:video|audio)>(?![\s\S]*</)|<(?:video|audio)>\s*$",
    re.IGNORECASE,
)
_LINK = re.compile(
    r"""<img\s[^<>]*?src\s*=\s*["']?(?P<html>[^"'<>\s]+)|!\[[^\]\n]*\]\(\s*(?P<markdown>[^()\s]+)""", re.IGNORECASE
)
"""Links in HTML and Markdown are words, as in code, unless they name a file of the image folder."""
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
    """The places of images in some texts, in order. Raises ValueError for a place that is written in an unknown way."""
    for text in texts:
        _refuse_marks(_SLOT.sub("", text), root)
    return [Slot(index, _own_path(found, root)) for index, text in enumerate(texts) for found in _SLOT.finditer(text)]


def _own_path(found: re.Match[str], root: Path) -> Path | None:
    """The path that a place in a text names itself; of ``<image></image>`` and of marks None."""
    path = (found["path"] or "").strip()
    if not found["tag"] or (not path and found["tag"].lower() == "image"):
        return None
    if not path:
        raise ValueError(f"names an image that is missing: {found[0]} has no path; write <img>path</img>, or remove it")
    return inside(path, root, "<img>")


def _refuse_marks(text: str, root: Path) -> None:
    """Raises ValueError where the rest of a text marks an image in another way, or links to one of the folder."""
    found = _OTHER_MARK.search(text)
    for link in _LINK.finditer(text):
        if os.path.isfile(root / (link["html"] or link["markdown"]).lstrip(os.sep)):
            found = found or link
    if found:
        raise ValueError(
            f"marks an image in a way that is not read: {found[0].strip()[:80]!r}; write {MARK} in its place"
        )


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
    refuse_others(row, images, keys, root)
    return images


def field_image(row: Row, key: str, root: Path) -> Path:
    """The image that a field must name, and no other."""
    found = _paths(row.get(key), key)
    if len(found) != 1:
        raise ValueError(f"must name one image in {key!r}, names {len(found)}; it has: {', '.join(sorted(row))}")
    return inside(found[0], root, key)


def named_one(row: Row, root: Path, needed: bool = False) -> Path | None:
    """The only image that a row's fields name, or None. needed: whether it must name one."""
    found = named(row, root)
    if len(found) > 1 or (needed and not found):
        raise ValueError(f"must name one image in 'image', names {len(found)}; it has: {', '.join(sorted(row))}")
    return found[0] if found else None


def refuse_others(row: Row, images: Sequence[Path], keys: Collection[str], root: Path, where: str = "") -> None:
    """Raises ValueError where a field that no reader reads names another image than those of the row.

    A row with an image may have other paths and addresses beside it, but none under a key that is an image's.

    Args:
        images: those that are read.
        keys: fields of `KEYS` and `READ` to look at as well.
        where: what the row is, if it is part of another.
    """
    for key in row:
        for value in _named_in(row[key]) if key in keys or _plain(key) not in {*KEYS, *READ} else ():
            if isinstance(value, ImageBytes):
                if not images or _is_other(_plain(key), value, images, root):
                    raise ValueError(f"has an image that is not read, in {key!r}{where}; name its column 'image'")
                continue
            is_file = _FILE.fullmatch(value) is not None
            if images:
                lost = is_file and _is_other(_plain(key), value, images, root)
            else:
                lost = is_file or (_LIKE_IMAGE.fullmatch(_plain(key)) and value.lower() not in _NO_IMAGE)
            if lost and not (is_file and PurePath(value).stem.lower() == "null"):
                shown = value if len(value) <= 80 else f"{value[:80]}..."
                raise ValueError(f"names an image that is not read, in {key!r}{where}: {shown}; name it in 'image'")


def _is_other(key: str, value: str | ImageBytes, images: Sequence[Path], root: Path) -> bool:
    """Whether a file's name or address under a key is that of another image than those that are read."""
    if not (_LIKE_IMAGE.fullmatch(key) or _OTHER_IMAGE.search(key) or key in KEYS):
        return False
    about = _ABOUT.fullmatch(key) if isinstance(value, str) else None
    if (
        about
        and isinstance(value, str)
        and (about["kind"] == "id" or "://" in value or PurePath(value).stem in {path.stem for path in images})
    ):
        return False
    try:
        return inside(value, root, key) not in images
    except ValueError:
        return True


def _plain(key: str) -> str:
    return key.lower().replace("-", "_").replace(" ", "_")


def _paths(value: Any, key: str) -> list[str | ImageBytes]:
    """The paths in a field: a string, a list, or an object with a path, as ``datasets`` writes it. Bytes of a table."""
    if value is None:
        return []
    if isinstance(value, ImageBytes):
        return [value]
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict) and not value.get("bytes"):
        paths: list[str | ImageBytes] = [
            value[key].strip() for key in ("path", "url") if isinstance(value.get(key), str)
        ]
        if len(paths) == 1:
            return paths
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of paths, got {type(value).__name__}")
    if any(isinstance(item, list) for item in value):
        raise ValueError(f"{key!r} must be a list of paths, got lists in it")
    try:
        return [path for item in value for path in _paths(item, key)]
    except ValueError as error:
        raise ValueError(f"{key!r} must be a list of paths: {error}") from error


def _no_image(value: str | ImageBytes, root: Path) -> bool:
    """Whether a value says that there is no image: "", "none", "null", or as released a file null.* that is missing."""
    if isinstance(value, ImageBytes):
        return False
    if value.strip().lower() in _NO_IMAGE:
        return True
    return PurePath(value).stem.lower() == "null" and not os.path.isfile(root / value)


def _named_in(value: Any) -> Iterator[str | ImageBytes]:
    """The strings and images in a value."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, ImageBytes):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _named_in(item)
