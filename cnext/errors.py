"""Errors that the user can correct. The command line prints them without a traceback and exits with status 2."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

RESUME = "run the same command again to resume from the last checkpoint"


class UserError(ValueError):
    """Bad input. The message says what was expected, what was found, and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show: the message, as the command line does; ``%debug`` still has the frames."""
        return [f"{type(self).__name__}: {self}"]


def unknown(kind: str, name: str, valid: list[str] | tuple[str, ...]) -> UserError:
    """The error for an unknown name; lists the valid ones."""
    return UserError(f"unknown {kind} {name!r}; valid: {', '.join(valid)}")


def listed(names: Iterable[str], shown: int = 8) -> str:
    """The first names of a list for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def printable(text: str) -> str:
    """A text of someone else's in one line: control characters, line ends, bidirectional overrides and lone surrogates
    are escaped, as ``\\x1b``, so that they cannot move the cursor or hide what stands there."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raises UserError for a number that is out of its range, or none (nan)."""
    if not least <= value <= most:
        bound = f"at most {most}" if value > most else f"at least {least}"
        # Python writes out no integer of thousands of digits.
        got = value if isinstance(value, float) or abs(value) < 1e30 else "a number of more than 30 digits"
        raise UserError(f"{name} must be {bound}, got {got}")


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, with a ValueError for a key that an object has twice, and for nesting that is too deep.

    The caller says which file it is.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, of whose values by one key Python keeps the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has the key {twice!r:.80} twice in one object")
    return found
