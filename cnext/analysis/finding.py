"""What an analysis gives: a table with the one sentence that says what its figures are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnext.errors import UserError

Cell = str | int | float | None | dict[str, Any]
"""Words, a count, a figure, nothing, or what ``tables.summary`` gives: n, mean, sd and perhaps low and high."""


class Unavailable(UserError):
    """The folders do not hold what the analysis needs; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """A table whose first ``words`` columns are words, the others figures: percent or points unless it says otherwise.

    name: for files and programs.  definition: one sentence.  signed: whether figures are shown with their sign.
    """

    name: str
    title: str
    definition: str
    head: list[str]
    rows: list[list[Cell]]
    words: int = 1
    signed: bool = False
    decimals: int = 2

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.head) for row in self.rows), self.name
