"""Digests of the rows that a run reads: of their texts, and of the bytes of their pictures and other files.

Paths are not part of them, so that a data folder may be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnext.tasks.base import DataError, Sample

WIDTH = 16
"""Hexadecimal digits of a row's digest."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class SplitDigest:
    """The digest of a task's rows of one split.

    rows: the first `WIDTH` hexadecimal digits of each row's SHA-256, in order, without a separator.
    """

    rows: str

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.rows) // WIDTH

    @property
    def sha256(self) -> str:
        """SHA-256 of the rows' digests."""
        return hashlib.sha256(self.rows.encode()).hexdigest()

    def first_difference(self, other: SplitDigest) -> int | None:
        """The index of the first row in which two differ, or that one of them lacks; None where they are equal."""
        for index in range(max(self.count, other.count)):
            place = slice(index * WIDTH, (index + 1) * WIDTH)
            if self.rows[place] != other.rows[place]:
                return index
        return None


DataDigest = dict[str, dict[str, SplitDigest]]
"""By the task's name and the split."""


def of_samples(samples: Mapping[str, Mapping[str, Sequence[Sample]]]) -> DataDigest:
    """The digests of samples by split and task, as `cnext.training.setup.read_suite` returns them.

    Raises:
        DataError: a file that a row names cannot be read.
    """
    files: dict[Path, str] = {}
    found: DataDigest = {}
    for split, by_task in samples.items():
        for task, listed in by_task.items():
            found.setdefault(task, {})[split] = SplitDigest("".join(_rows(listed, files)))
    return found


def joint(data: Mapping[str, Mapping[str, SplitDigest]]) -> str:
    """One SHA-256 of the digests of all tasks and splits, whatever their order."""
    return of_digests({task: {split: one.sha256 for split, one in splits.items()} for task, splits in data.items()})


def of_digests(digests: Mapping[str, Mapping[str, str]]) -> str:
    """`joint` of the SHA-256 of every split."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _rows(samples: Iterable[Sample], files: dict[Path, str]) -> Iterable[str]:
    for sample in samples:
        media = {"image": sample.image, "target_image": sample.target_image, **sample.media}
        read = [
            sample.id,
            [[turn.instruction, turn.answer] for turn in sample.turns],
            sample.prompt,
            sample.references,
            sample.category,
            sample.size,
            [sample.image_first, sample.tiled, sample.asks_image, sample.draw],
            {name: None if path is None else _file(path, sample, files) for name, path in media.items()},
        ]
        yield hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:WIDTH]


def _file(path: Path, sample: Sample, files: dict[Path, str]) -> str:
    """SHA-256 of a file's bytes, which are read once. files: those of earlier rows, which is added to."""
    if path not in files:
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"{sample.origin}: names a file that cannot be read: {path}: {error.strerror}") from error
        files[path] = digest.hexdigest()
    return files[path]
