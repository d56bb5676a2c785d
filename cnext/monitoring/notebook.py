"""Progress in a notebook: one output that is updated in place, and lines as plain output.

Needs only IPython's display protocol, which Jupyter, VS Code and Colab have: no widgets, no package of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

EVERY = 0.25
"""Seconds between two updates: a notebook keeps up with a few per second."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows what IPython displays."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def note(text: str) -> None:
    """Prints a line that is no result: on standard error, which notebooks show as an error's, else on their output."""
    print(text, file=sys.stdout if in_notebook() else sys.stderr)


class Row(NamedTuple):
    """How far something is: its name, a share from 0 to 1, and what is done now."""

    name: str
    share: float
    doing: str


class Bars:
    """Rows with bars in a notebook, updated in place; they vanish at the end. enabled: else nothing is shown."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.handle, self.last = enabled, None, 0.0

    def show(self, rows: Sequence[Row]) -> None:
        """Shows the rows in place of those before, at most every ``EVERY`` seconds."""
        if not self.enabled or (self.handle is not None and time.monotonic() - self.last < EVERY):
            return
        self.last = time.monotonic()
        if self.handle is None:
            from IPython.display import display

            self.handle = display(_bundle(rows), raw=True, display_id=True)
        else:
            self.handle.update(_bundle(rows), raw=True)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.update({"text/plain": ""}, raw=True)
            self.handle = None


def _bundle(rows: Sequence[Row]) -> dict[str, str]:
    """The rows as notebooks take them: as HTML, and as text where there is none."""
    text = "\n".join(f"{row.name} {row.share:4.0%}  {row.doing}".strip() for row in rows)
    cell = '<td style="text-align:left;border:0;background:none;padding:0 .6em 0 0">'
    html = "".join(
        f'<tr>{cell}<span style="white-space:nowrap">{escape(row.name)}</span></td>{cell}'
        f'<progress max="1" value="{row.share:.3f}" style="width:12em"></progress></td>'
        f"{cell}{row.share:.0%}</td>{cell}{escape(row.doing)}</td></tr>"
        for row in rows
    )
    return {"text/plain": text, "text/html": f'<table style="color:inherit">{html}</table>'}
