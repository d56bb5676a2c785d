"""Convert tyro's boxed messages about wrong flags to a UserError of one line.

tyro has no public interface to its parsing errors.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence

from cnext.errors import UserError

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_SECTIONS = {"Argument helptext:": "expected", "Perhaps you meant:": "perhaps you meant"}


@contextlib.contextmanager
def in_one_line(hyperparameters: Sequence[str]) -> Iterator[None]:
    """Inside, tyro's exit for wrong flags raises UserError, which lists ``hyperparameters`` if a flag is unknown."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(line(shown.getvalue(), hyperparameters)) from stop
    print(shown.getvalue(), end="", file=sys.stderr)


def line(box: str, hyperparameters: Sequence[str] = ()) -> str:
    """The error in a box with the expected value or a similar flag, without frame and help text."""
    rows = [row.strip("│| ") for row in _COLOR.sub("", box).splitlines()[1:-1]]
    parts = [list(part) for is_rule, part in itertools.groupby(rows, lambda row: not row.strip("─-")) if not is_rule]
    message = [" ".join(parts[0]).removeprefix("Error parsing ").removesuffix(".")]
    message += [f"{_SECTIONS[part[0]]} {part[1]}" for part in parts[1:] if part[0] in _SECTIONS]
    if message[0].startswith("Unrecognized options"):
        message.append(f"hyperparameters of these methods: {', '.join(hyperparameters) or 'none'}; others: --help-all")
    return "; ".join(message)
