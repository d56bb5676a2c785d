"""Decode JSON into typed records with msgspec. Errors name the file, the place in it, what was expected, what came."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from cnext.errors import UserError, parse_json
from cnext.regular_files import LARGEST, read_bytes

T = TypeVar("T")
SHOWN = 60
MAX_NAME, MAX_FILE, MAX_PATH = 100, 255, 1024
"""The longest name (characters), and what systems take as a file's name (bytes) and as a path (characters)."""

MAX = sys.float_info.max
Finite = Annotated[float, Meta(ge=-MAX, le=MAX)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
PositiveInt = Annotated[int, Meta(ge=1, lt=2**53)]


class Record(msgspec.Struct):
    """An object of a JSON file, typed. Keys that it does not declare are ignored."""


class Checked(str):
    """A string with a condition, checked as it is decoded; the docstring is the condition in words."""

    fits: ClassVar[Callable[[str], bool]]


class FileName(Checked):
    """a name that can be a file's: at most 100 printable characters, no slash, no dot first"""

    @staticmethod
    def fits(value: str) -> bool:
        return 0 < len(value) <= MAX_NAME and value[0] != "." and value.isprintable() and not set(value) & set("/\\")


class ModalityName(Checked):
    """a name of lowercase letters, digits and underscores"""

    @staticmethod
    def fits(value: str) -> bool:
        return re.fullmatch(r"[a-z][a-z0-9_]*", value) is not None


class AnyPath(Checked):
    """a path"""

    @staticmethod
    def fits(value: str) -> bool:
        printable = value.isprintable() and len(value) <= MAX_PATH
        return printable and all(len(part.encode()) <= MAX_FILE for part in value.split("/"))


class RelativePath(Checked):
    """a path or pattern that stays within its folder"""

    @staticmethod
    def fits(value: str) -> bool:
        parts = value.replace("\\", "/").split("/")
        # Two "**" make a search walk every folder again and again.
        wild = parts.count("**") > 1 or any("**" in part != "**" for part in parts)
        return AnyPath.fits(value) and not value.startswith(("/", "\\")) and ".." not in parts and not wild


def _checked(kind: type, value: Any) -> Any:
    if isinstance(value, str) and kind.fits(value):
        return kind(value)
    text = repr(value)
    raise ValueError(f"Expected {kind.__doc__}, got {text if len(text) <= SHOWN else f'{text[:SHOWN]}...'}")


def convert(value: Any, kind: type[T], where: str | Path, advice: str) -> T:
    """A decoded JSON value as a record, or as any type that msgspec knows.

    Args:
        where: names the value in errors, as "runs/a/results.json".
        advice: what the user can do.

    Raises:
        UserError: it is of another type, as in "results.json: Expected `int`, got `str` - at `$.seed`; run it again".
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_checked)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}; {advice}") from error


def plain(value: Any) -> Any:
    """The JSON value of records, dataclasses and what they hold: dictionaries, lists, strings and numbers."""
    return msgspec.to_builtins(value, enc_hook=str)


def read(path: Path, kind: type[T], advice: str) -> T:
    """The record in a JSON file. Raises UserError as `convert`, and where there is no JSON."""
    try:
        value = parse_json(read_bytes(path, LARGEST))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON, could not read it ({error}); {advice}") from error
    return convert(value, kind, path, advice)
