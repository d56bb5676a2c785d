"""The errors that are the user's to mend. The command line prints them without a traceback and exits with 2."""

from __future__ import annotations

import json
from typing import Any

GO_ON = "the same command goes on"


class UserError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do."""


def unknown(kind: str, name: str, valid: list[str] | tuple[str, ...]) -> UserError:
    """The error for a name that is not known; lists the valid ones."""
    return UserError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, of which nesting without end is a ValueError like every other mistake.

    A UserError is a ValueError as well: who reads a file says which file it is.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
