"""What tyro says of wrong flags in a box of several lines, as one line."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence

from cnext.errors import UserError

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_ASIDES = {"Argument helptext:": "expected", "Perhaps you meant:": "perhaps you meant"}


@contextlib.contextmanager
def in_one_line(hyperparameters: Sequence[str]) -> Iterator[None]:
    """Makes an exit of tyro's for wrong flags a UserError. hyperparameters: flags to name where one is not known."""
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
    """A box's mistake, and what is valid or near to it where the box says so; its frame and help are left out."""
    rows = [row.strip("│| ") for row in _COLOR.sub("", box).splitlines()[1:-1]]
    parts = [list(part) for is_rule, part in itertools.groupby(rows, lambda row: not row.strip("─-")) if not is_rule]
    said = [" ".join(parts[0]).removeprefix("Error parsing ").removesuffix(".")]
    said += [f"{_ASIDES[part[0]]} {part[1]}" for part in parts[1:] if part[0] in _ASIDES]
    if said[0].startswith("Unrecognized options"):
        said.append(f"hyperparameters here: {', '.join(hyperparameters) or 'none'}; other flags: cnext-run --help")
    return "; ".join(said)
