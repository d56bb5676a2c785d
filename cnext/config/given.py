"""Convert and check the values that are given for a configuration in Python."""

from __future__ import annotations

import functools
import numbers
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnext.errors import UserError

NAMES_OR_FOLDERS = ("suite", "clip")
"""Strings that may name a folder or file, and be given as a path."""
ONE_OR_SEVERAL = ("log",)
"""Lists of names of which one may be given as a string."""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def converted(config: Any) -> dict[str, Any]:
    """The values of a dataclass's fields as their types say: strings become paths, lists tuples.

    Raises:
        UserError: a value is of another type. What it names, and how large it is, is checked by `plan`.
    """
    return {name: _converted(name, getattr(config, name), hint) for name, hint in _hints(type(config)).items()}


def _converted(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if kind is Path:
        if name == "data" and isinstance(value, Mapping):  # of datasets by task and split
            return value
        if isinstance(value, str | os.PathLike) and isinstance(path := os.fspath(value), str) and path:
            return Path(_text(name, path))
    elif kind is str or typing.get_origin(kind) is typing.Literal:
        if isinstance(value, str) or (name in NAMES_OR_FOLDERS and isinstance(value, os.PathLike)):
            return _text(name, str(value))
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif kind is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return value if isinstance(value, int) else float(value)
    elif typing.get_origin(kind) is tuple:
        if name in ONE_OR_SEVERAL and isinstance(value, str):
            return (value,)
        if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(_text(name, each) for each in value)
    elif isinstance(value, Mapping):
        return dict(value)
    expected = _in_words(name, kind) + (" or None" if type(None) in options else "")
    raise UserError(f"{name} must be {expected}, got {value!r:.80} ({type(value).__name__})")


def _text(name: str, value: str) -> str:
    """The value. Raises UserError for bytes that are no UTF-8, as in a file's name, and for a zero character."""
    try:
        if b"\0" not in value.encode():
            return value
    except UnicodeEncodeError:
        pass
    raise UserError(f"{name} must be text in UTF-8 without zero characters, got {value!r:.200}; rename the file")


def _in_words(name: str, kind: Any) -> str:
    """What is expected, as said in an error."""
    if name == "order":
        return 'a string such as "reverse" or "a,b,c"'
    if name == "data":
        return "a folder as a string or Path, or datasets by task and split"
    if kind is Path:
        return "a path as a string or Path"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a name or a list of names" if name in ONE_OR_SEVERAL else "a list of strings"
    text = "a name or a path" if name in NAMES_OR_FOLDERS else "a string"
    words = {str: text, bool: "True or False", int: "a whole number", float: "a number"}
    return words.get(kind, "a dictionary by name")
