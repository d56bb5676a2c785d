"""Reads rows of JSONL, JSON, Parquet and CSV files with their origins, and the fields that formats share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import Any

from cnext.errors import listed, parse_json
from cnext.regular_files import require_regular
from cnext.tasks import tables
from cnext.tasks.base import DataError
from cnext.tasks.kept_images import ImageBytes

Row = dict[str, Any]
SUFFIXES = "by its suffix a file is .jsonl, .parquet, .csv or .tsv, any other is JSON"
_LONGEST, _LONGEST_PART = 4095, 255
"""Characters of a path and of a name in it, beyond which no file system has files."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def text(row: Row, name: str) -> str:
    """A field that must be a string. Raises ValueError, as all functions of fields do."""
    if name not in row:
        raise ValueError(f"lacks the key {name!r}; it has: {', '.join(sorted(row)) or 'none'}")
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} must be a string, got {type(row[name]).__name__}")
    return row[name]


def answers(row: Row, name: str) -> tuple[str, ...]:
    """A field with one accepted answer, or a list of them. A number is read as text, four of a box as one answer."""
    value = row.get(name)
    if name not in row or isinstance(value, str):
        return (text(row, name),)
    given = value if isinstance(value, list) else [value]
    numbers = [each for each in given if _is_number(each)]
    if name == "answer_bbox" and numbers:
        if isinstance(value, list) and len(numbers) == len(given) == 4:
            return (f"[{','.join(map(json.dumps, numbers))}]",)
        raise ValueError(f"{name!r} must be a box of four numbers, got {len(numbers)} in {len(given)} values")
    others = [type(each).__name__ for each in given if not isinstance(each, str) and not _is_number(each)]
    if others or not given:
        found = others[0] if others else "an empty list"
        raise ValueError(f"{name!r} must be a string, a number or a list of these, got {found}")
    return tuple(each if isinstance(each, str) else json.dumps(each) for each in given)


def _is_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and isfinite(value))


def inside(relative: str | ImageBytes, root: Path, name: str) -> Path:
    """The path of an image within its folder; its existence is not checked. Of bytes in a table, a file in the cache.

    Args:
        relative: may also be absolute, or begin with a slash and still be relative to the folder.

    Raises:
        ValueError: a path that leaves the folder, an address or encoded image in its place, or a PDF.
    """
    if isinstance(relative, ImageBytes):
        return relative.file()
    given = relative.removeprefix("file://")
    encoded = len(given) > _LONGEST or any(len(part) > _LONGEST_PART for part in given.split("/"))
    if "://" in given or given.startswith("data:") or encoded:
        raise ValueError(f"{name!r} names no file: {given[:80]}; save the image in the image folder {root}")
    # Compared as text and not resolved, so that a link inside the root may point to another disk.
    normal = os.path.normpath(given)
    if os.path.isabs(normal):
        normal = _below(normal, root)
    if os.path.isabs(normal) or normal == ".." or normal.startswith(f"..{os.sep}"):
        raise ValueError(f"{name!r} leaves the image folder {root}: {relative}")
    if normal.lower().endswith(".pdf"):
        raise ValueError(f"{name!r} names a PDF, which is not read: {relative}; save its first page as a PNG")
    return root / normal


def _below(absolute: str, root: Path) -> str:
    """An absolute path relative to a folder that holds it, or a slash before a file of the folder; else unchanged."""
    for folder in (os.path.abspath(root), os.path.realpath(root)):
        if absolute.startswith(f"{folder.rstrip(os.sep)}{os.sep}"):
            return os.path.relpath(absolute, folder)
    relative = absolute.lstrip(os.sep)
    return relative if os.path.isfile(root / relative) else absolute


def files(data: Path, pattern: str) -> list[Path]:
    """The files that match a pattern, sorted, and folders of saved datasets.

    Raises:
        DataError: there are none; the message has what the folder contains.
    """
    matched = list(data.glob(pattern))
    found = sorted(path for path in matched if path.is_file() or tables.is_saved(path))
    if data.is_file():
        raise DataError(f"no file matches {data / pattern}; {data} is a file, no folder")
    for path in matched:
        tables.refuse_splits(path)
        if not path.is_dir():
            _require_file(path)
    if not found:
        folder = data
        for part in Path(pattern).parts[:-1]:
            if not (folder / part).is_dir():
                break
            folder = folder / part
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["nothing: it is not there"]
        raise DataError(f"no file matches {data / pattern}; {folder} holds {listed(there) or 'nothing'}")
    return found


def _require_file(path: Path) -> None:
    """A pipe or a link to nothing among the files must not shorten the data in silence."""
    try:
        require_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; put a file there, or correct the path in the suite") from error


def rows(
    path: Path, advance: Callable[[int], None] | None = None
) -> Generator[tuple[str, Row | ValueError], None, None]:
    """Yields (origin, row or ValueError) for every row of a file; spaces in keys become underscores.

    The file is open until the generator ends: close it where the rows are not all read.

    Args:
        path: JSONL, Parquet, CSV by their suffixes, or the folder of a saved dataset; else JSON.
        advance: called with the number of bytes read, now and then.
    """
    advance = advance or (lambda count: None)
    for file in tables.files(path):
        require_regular(file)
    read = tables.lines(path, advance) or (_lines if path.suffix.lower() == ".jsonl" else _list)(path, advance)
    with closing(read):
        for origin, value in read:
            if isinstance(value, dict):
                row = {key.replace(" ", "_"): field for key, field in value.items()}
                twice = sorted(key for key in value.keys() - row.keys() if key.replace(" ", "_") in value)
                problem = f"has the keys {listed(twice)} with a space and with an underscore, which are one; keep one"
                yield origin, ValueError(problem) if twice else row
            elif isinstance(value, ValueError):
                yield origin, value
            else:
                yield origin, ValueError(f"must be a JSON object, got {type(value).__name__}")


def _parsed(content: bytes) -> Any:
    """The JSON value of some bytes, or a ValueError that says why there is none."""
    try:
        return parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return ValueError(f"is not JSON: {error.msg} at {line}column {error.colno}")
    except ValueError as error:
        return ValueError(f"is not JSON: {error}")


def _lines(path: Path, advance: Callable[[int], None]) -> tables.Lines:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            advance(len(line))
            if line.strip():
                value = _parsed(line)
                yield f"{path}:{number}", _without_surrogates(value) if _SURROGATE.search(line) else value


def _list(path: Path, advance: Callable[[int], None]) -> tables.Lines:
    content = path.read_bytes()
    value = _parsed(content)
    advance(len(content))
    if isinstance(value, list):
        look = _without_surrogates if _SURROGATE.search(content) else lambda row: row
        yield from ((f"{path}#{index}", look(row)) for index, row in enumerate(value))
    elif isinstance(value, ValueError):
        yield str(path), value if path.suffix.lower() == ".json" else ValueError(f"{value}; {SUFFIXES}")
    else:
        yield str(path), ValueError(f"must hold one JSON list, got {type(value).__name__}")


def _without_surrogates(value: Any) -> Any:
    """The value, or a ValueError if it has an unpaired surrogate, which file names and tokenizers do not accept."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return ValueError(f"is not Unicode text: {error}")
    return value
