"""Rows of data files that a run leaves out: unusable ones that are to be skipped, and what released filters drop."""

from __future__ import annotations

from typing import Any, NamedTuple

ON_BAD_ROW = ("refuse", "skip")
LISTED = 1000
"""Most rows listed per reason in the file; all are counted."""
MALFORMED, MISSING, BROKEN, UNFIT = "malformed", "missing image", "broken image", "image unfit for the backbone"
MISSING_FILE, REFERENCE, TOO_LONG = "missing file", "unusable reference", "too long"
RELEASED_SIZE, RELEASED_LENGTH = "image size, as released", "length, as released"


class Problem(NamedTuple):
    """Why a row cannot be used: the kind of problem, and all that is known of it."""

    reason: str
    text: str


class LeftOut:
    """The rows left out, by task, split and reason.

    Example:
        >>> left = LeftOut()
        >>> left.add("VQAv2", "train", MISSING, "train.jsonl:7: names an image that is missing: 7.jpg")
        >>> left.lines()
        ['VQAv2 train: 1 row left out: 1 missing image']
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, dict[str, list[str]]]] = {}

    def add(self, task: str, split: str, reason: str, row: str) -> None:
        """Adds a row: where it is, and what is wrong with it."""
        self.rows.setdefault(task, {}).setdefault(split, {}).setdefault(reason, []).append(row)

    def summary(self, task: str, split: str) -> str:
        """How many rows of a split are left out, and why; "" for none."""
        return summary({reason: len(rows) for reason, rows in self.rows.get(task, {}).get(split, {}).items()})

    def lines(self) -> list[str]:
        """The `summary` of every split that lacks rows."""
        return [f"{task} {split}: {self.summary(task, split)}" for task in self.rows for split in self.rows[task]]

    def as_dict(self) -> dict[str, Any]:
        """The content of left_out.json: by task, split and reason their count, and the first ``LISTED`` rows."""
        return {
            task: {
                split: {reason: {"count": len(rows), "rows": rows[:LISTED]} for reason, rows in reasons.items()}
                for split, reasons in splits.items()
            }
            for task, splits in self.rows.items()
        }


def summary(counts: dict[str, int]) -> str:
    """How many rows are left out, by reason: "3 rows left out: 2 malformed, 1 missing image"; "" for none."""
    total = sum(counts.values())
    parts = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"{total:,} row{'' if total == 1 else 's'} left out: {parts}" if total else ""
