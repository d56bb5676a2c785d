"""Whether results to be averaged or compared are of the same data, from results.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cnext.runs import fingerprint
from cnext.runs.schemas import DataSummary

Known = Mapping[str, Mapping[str, DataSummary]]
"""By task and split."""


def pairs(one: Known | None, other: Known | None, alone: bool = True) -> list[tuple[str, str, str]]:
    """(what, one, other) for each task and split whose data differ; [] where one is unknown.

    alone: whether what is in one alone is a difference, as a held-out set that the other does not score.
    """
    if one is None or other is None:
        return []
    found = []
    for task in dict.fromkeys([*one, *other]):
        for split in dict.fromkeys([*one.get(task, {}), *other.get(task, {})]):
            here, there = one.get(task, {}).get(split), other.get(task, {}).get(split)
            if here != there and (alone or (here and there)):
                found.append((f"data of {task}, {split}", _said(here), _said(there)))
    return found


def _lines(one: Known, other: Known) -> list[str]:
    return [f"{what}: {here} and {there}" for what, here, there in pairs(one, other)]


def _said(part: DataSummary | None) -> str:
    return "none" if part is None else f"{part.rows} rows of SHA-256 {part.sha256[:12]}"


def check_alike(data: Mapping[str, Known | None], mix: bool = False) -> list[str]:
    """Notes on the data of results to be averaged; [] where they are equal, or not known.

    Args: data: by the runs' names.  mix: average different ones, and note it.
    Raises: UserError naming the tasks that differ, without ``mix``.
    """
    known = {name: one for name, one in data.items() if one is not None}
    if not known:
        return []
    what = "on different data, so that their scores do not compare"
    fields = fingerprint.unlike(known, _lines, what, "" if mix else "--mix-data")
    if not fields:
        return []
    count = len({json.dumps({t: {s: p.sha256 for s, p in d.items()} for t, d in o.items()}) for o in known.values()})
    return [f"Averaged over runs on {count} different sets of data. {'; '.join(fields)}."]


def older(data: Iterable[Any]) -> str:
    """A note on results without digests of their data; "" if all have them."""
    data = list(data)
    count = sum(found is None for found in data)
    listed = f"{count} of {len(data)} runs have no digest of their data (results of an earlier version)"
    return f"{listed}; that these are the same data is not checked" if count else ""
