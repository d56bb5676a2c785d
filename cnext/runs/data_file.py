"""The digests of a run's data in its folder.

data.json has those of every row, so that the first one that has changed is named; config.json and checkpoints have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnext.config.plan import DATA_KEY
from cnext.errors import UserError, parse_json
from cnext.regular_files import read_bytes
from cnext.tasks.base import Sample
from cnext.tasks.data_digest import WIDTH, DataDigest, SplitDigest, joint

FILE = "data.json"
CURE = "restore the data, give another --out or delete the folder"
UNKNOWN = "of an earlier version, which kept no digest of the data: whether they have changed since is not known"


def summary(data: DataDigest) -> dict[str, Any]:
    """ "data" in results.json: SHA-256 and number of rows, by task and split."""
    return {
        task: {split: {"sha256": one.sha256, "rows": one.count} for split, one in splits.items()}
        for task, splits in data.items()
    }


def kept(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """A configuration with the joint digest that the config.json there has, if any, until the data are read again."""
    old = parse_json(read_bytes(file)) if file.is_file() else {}
    return {**config, **({DATA_KEY: old[DATA_KEY]} if isinstance(old, dict) and DATA_KEY in old else {})}


def keep(
    folder: Path,
    data: DataDigest,
    samples: Mapping[str, Mapping[str, Sequence[Sample]]],
    begun: bool,
    write: Callable[[str, dict[str, Any]], object],
) -> str:
    """Writes the digests into data.json and config.json of a run folder, and checks them against those there.

    Args:
        samples: by split and task, to name rows.
        begun: whether the folder has results, so that the data must be the same.
        write: writes a JSON file of the folder, by its name.

    Returns: a note on what cannot be checked, or is written anew; "" for none.
    Raises:
        UserError: the data have changed; names every task and split, and the first row.
    """
    config, file = parse_json(read_bytes(folder / "config.json")), folder / FILE
    found, known, rows = joint(data), config.get(DATA_KEY), _read(file)
    old, note = None if rows is None else joint(rows), ""
    if begun and found != (old if known is None else known):
        if known is not None or old is not None:
            raise changed(folder, _changes(rows, data, samples) if rows and known in (None, old) else [])
        note = f"note: the run in {folder} is {UNKNOWN}"
    elif begun and old != found:
        note = f"{file} was lost or has changed; it is written anew, for the data are those of config.json"
    write(FILE, {"rows": {t: {s: one.rows for s, one in splits.items()} for t, splits in data.items()}})
    write("config.json", {**config, DATA_KEY: found})
    return note


def changed(folder: Path, lines: Sequence[str]) -> UserError:
    """The error for a run whose data have changed. lines: on the rows; none where data.json is lost or damaged."""
    lines = lines or [f"  which rows is not known, for {FILE} is lost or has changed"]
    return UserError("\n".join([f"the data of the run in {folder} have changed since it began:", *lines, CURE]))


def _read(file: Path) -> DataDigest | None:
    """The digests in a data.json; None where there are none, or it is damaged."""
    try:
        rows = parse_json(read_bytes(file))["rows"]
        found = {task: {split: SplitDigest(str(text)) for split, text in rows[task].items()} for task in rows}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if all(len(one.rows) % WIDTH == 0 for splits in found.values() for one in splits.values()) else None


def _changes(old: DataDigest, new: DataDigest, samples: Mapping[str, Mapping[str, Sequence[Sample]]]) -> list[str]:
    """A line for each task and split that differs, with the first row."""
    lines = []
    for task in dict.fromkeys([*old, *new]):
        for split in dict.fromkeys([*old.get(task, {}), *new.get(task, {})]):
            then, now = (each.get(task, {}).get(split, SplitDigest("")) for each in (old, new))
            index = then.first_difference(now)
            if index is None:
                continue
            listed = samples.get(split, {}).get(task, ())
            row = f"{listed[index].origin} (id {listed[index].id})" if index < len(listed) else "no longer there"
            counts = f", {then.count} rows then, {now.count} now" if then.count != now.count else ""
            lines.append(f"  task {task}, {split}: first row that differs: row {index + 1}, {row}{counts}")
    return lines
