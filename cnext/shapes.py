"""What values read from JSON must look like, said in values: checked where a file is read, relied on afterwards.

* str, bool, int, list, dict: one of that type (True is no int)
* float: a finite number
* None: null
* object: anything
* [shape]: a list of these
* {str: shape}: an object of these under any keys
* {"a": shape, "b?": shape}: an object with "a" and perhaps "b", and perhaps more
* (shape, shape): one of them
* a function: a value of which it is true, named by its docstring
"""

from __future__ import annotations

import json
import sys
from typing import Any

SHOWN = 60
LONGEST, FILE, PATH = 100, 255, 1024
"""The longest name, and what systems take as a file's name (bytes) and as a path (characters)."""


def name(value: Any) -> bool:
    """a name that can be a file's as well: no slash, no dot first, nothing that cannot be printed"""
    fits = isinstance(value, str) and 0 < len(value) <= LONGEST and value[0] != "." and value.isprintable()
    return fits and not set(value) & set("/\\")


def path(value: Any) -> bool:
    """a path"""
    if not isinstance(value, str) or not value.isprintable() or len(value) > PATH:
        return False
    return all(len(part.encode()) <= FILE for part in value.split("/"))


def relative(value: Any) -> bool:
    """a path or pattern that stays within its folder"""
    if not path(value) or value.startswith(("/", "\\")):
        return False
    parts = value.replace("\\", "/").split("/")
    # More than one "**" looks at every folder again and again.
    return ".." not in parts and parts.count("**") < 2 and not any("**" in part != "**" for part in parts)


def wrong(value: Any, shape: Any, where: str = "") -> str:
    """What is wrong with a value, and at which place in it; "" where nothing is."""
    if isinstance(shape, tuple):
        found = [wrong(value, each, where) for each in shape]
        return "" if "" in found else max(found, key=_depth)
    if isinstance(shape, list) and isinstance(value, list):
        return next((found for i, each in enumerate(value) if (found := wrong(each, shape[0], f"{where}[{i}]"))), "")
    if isinstance(shape, dict) and isinstance(value, dict):
        return _wrong_object(value, shape, where)
    return "" if _fits(value, shape) else f"{where or 'the value'}: expected {_words(shape)}, got {_short(value)}"


def _depth(found: str) -> int:
    return found.partition(":")[0].count(".") + found.partition(":")[0].count("[")


def _wrong_object(value: dict[str, Any], shape: dict[Any, Any], where: str) -> str:
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    for label, each in shape.items():
        key = label.removesuffix("?")
        place = f"{where}.{key}" if where else key
        if key not in value:
            if key == label:
                return f"{place}: missing"
        elif found := wrong(value[key], each, place):
            return found
    return ""


def _fits(value: Any, shape: Any) -> bool:
    if shape is None or isinstance(shape, list | dict):
        return value is None and shape is None
    if not isinstance(shape, type):
        return shape(value)
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, shape) and (shape is not int or not isinstance(value, bool))


def _words(shape: Any) -> str:
    if shape is None:
        return "null"
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, list):
        return f"a list of {_words(shape[0])}"
    if isinstance(shape, dict):
        return "an object"
    if not isinstance(shape, type):
        return str(shape.__doc__)
    plain = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    return plain.get(shape, "a list" if shape is list else "an object")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
