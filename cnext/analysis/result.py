"""The result of an analysis: a table and a definition of its values."""

from __future__ import annotations

from dataclasses import dataclass

from cnext.errors import UserError
from cnext.tables.aggregate import Summary

Cell = str | int | float | None | Summary
"""Text, a count, a value, nothing, or a summary of several values."""


class Unavailable(UserError):
    """The folders lack what an analysis needs; the message says what."""


@dataclass(frozen=True)
class ResultTable:
    """A table. Its first ``words`` columns are text, the others values, in percent or points unless it says otherwise.

    name: for files and programs.  definition: of the values.  signed: whether values are shown with their sign.
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
