"""Errors in what a user gives: the command line prints their message, without a traceback, and exits with 2."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

GO_ON = "the same command goes on"


class UserError(ValueError):
    """Bad input. The message says what was expected, what was found, and what to do."""


def unknown(kind: str, name: str, valid: list[str] | tuple[str, ...]) -> UserError:
    """The error for an unknown name, which lists the valid ones."""
    return UserError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def listed(names: Iterable[str], shown: int = 8) -> str:
    """The first names of a list for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` that raises ValueError for too deep nesting as well.

    Callers add the file's name to the error.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
