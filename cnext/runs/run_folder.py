"""Run folder: configuration, append-only logs, checkpoints, and the checkpoint to resume from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, TypeVar

from torch import Tensor

from cnext import durable, records
from cnext.config.plan import completed
from cnext.errors import UserError, parse_json
from cnext.regular_files import read_bytes
from cnext.runs import checkpoint, data_file, schemas
from cnext.runs.checkpoint import Damaged
from cnext.runs.schemas import StageScore, TrainStep
from cnext.runs.trackers.base import Tracker, final
from cnext.tasks.base import Sample
from cnext.tasks.data_digest import DataDigest

STEPS, SCORES, EXTRA = "train.jsonl", "scores.jsonl", "extra_scores.jsonl"
LEFT_OUT = "left_out.json"
LOGS = (STEPS, SCORES, EXTRA)
"""The append-only logs. A checkpoint has the length and the checksum that they had before it."""

T = TypeVar("T")


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"  {path}: {json.dumps(old)} there, {json.dumps(new)} requested"]


def _append(path: Path, rows: Iterable[Any]) -> None:
    durable.append(path, "".join(json.dumps(records.plain(row)) + "\n" for row in rows).encode())


def _rows(path: Path, kind: type[T]) -> list[tuple[bytes, T]]:
    """Lines and rows of an append-only log up to the first that is incomplete, as after an interruption."""
    rows = []
    for line in _content(path).split(b"\n")[:-1]:
        try:
            rows.append((line, schemas.convert(parse_json(line), kind, path)))
        except ValueError:
            break
    return rows


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return b""


def check_free(path: Path, config: dict[str, Any]) -> None:
    """Raises UserError where a run of this configuration can neither start nor resume in a folder.

    It holds results of another configuration (every difference is named), or other files. A configuration without
    results is replaced.
    """
    there = next(place for place in (path, *path.parents, Path()) if place.exists())
    if not there.is_dir():
        raise UserError(f"expected a folder for the runs, {there} is a file; give another --out")
    file = path / "config.json"
    if file.is_file():
        try:
            old = parse_json(file.read_bytes())
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}); give another --out or delete the folder") from error
        changed = _differences(completed(old, config) if isinstance(old, dict) else old, config)
        if changed and (path / "scores.jsonl").exists():
            listed = "\n".join(changed)
            raise UserError(
                f"{path} holds a run of another configuration:\n{listed}\ngive another --out or delete the folder"
            )
    elif path.is_dir() and any(not other.name.startswith(".") for other in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no config.json; give another --out")


class InUse(UserError):
    """Another process has the folder of a run."""


class RunFolder:
    """Opens or makes the folder of a run. Raises UserError as `check_free`, and while another process uses it."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.trackers: Sequence[Tracker] = ()
        file = path / "config.json"
        check_free(path, config)
        durable.make_folder(path)
        self._lock = self._locked()
        with ExitStack() as undo:
            undo.callback(self.close)
            checkpoint.write_json(file, data_file.kept(config, file))
            durable.make_folder(self.checkpoints)
            durable.restore(self.checkpoints)
            # What the process before was writing when it was killed, and resuming reads.
            for name in LOGS:
                if (path / name).is_file():
                    durable.sync(path / name)
            undo.pop_all()

    def _locked(self) -> IO[str]:
        """The open lock file. The system releases it when the process ends."""
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 (closed by close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise InUse(f"another process is running in {self.path}; wait for it or give another --out") from error
        return lock

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self._lock.close()

    def note_left_out(self, rows: dict[str, Any]) -> None:
        """Writes left_out.json, see `LeftOut.as_dict`; no file where nothing is left out.

        Raises: UserError where the run has results with other rows left out, so that its samples were others.
        """
        file = self.path / LEFT_OUT
        old = schemas.read(file, dict[str, Any]) if file.is_file() else {}
        if old != rows and _content(self.path / SCORES):
            there = f"those in {LEFT_OUT} there" if old else "none"
            raise UserError(
                f"{self.path} holds a run that left out other rows of the data ({there}): the data, or what "
                "cnext reads of them, have changed since; restore them, give another --out or delete the folder"
            )
        if rows:
            checkpoint.write_json(file, rows)
        else:
            file.unlink(missing_ok=True)

    def note_data(self, data: DataDigest, samples: Mapping[str, Mapping[str, Sequence[Sample]]]) -> str:
        """`data_file.keep`: digests of the data, which must be those that the run's results come from."""
        begun = any(_content(self.path / name) for name in LOGS) or any(self.checkpoints.glob("[!.]*"))
        return data_file.keep(self.path, data, samples, begun)

    def furthest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(path, tensors, values) of the latest intact checkpoint, to resume from; None if there is none.

        Checkpoints that are damaged, or whose logs have changed since, are skipped and named.

        Raises: UserError where there are checkpoints and none is intact.
        """
        found, damaged = self._whole()
        for _, path in reversed(found):
            try:
                tensors, values = checkpoint.load(path)
                self._check_logs(values.pop("logs", {}))
            except Damaged as error:
                damaged.append(str(error))
                continue
            if damaged:
                say("\n".join([*dict.fromkeys(damaged), f"falling back to {path.name}; later steps are repeated"]))
            return path, tensors, values
        if damaged:
            listed = "\n".join(dict.fromkeys(damaged))
            raise UserError(f"no checkpoint of this run is intact:\n{listed}\ndelete {self.path} to start again")
        return None

    def _check_logs(self, kept: dict[str, dict[str, Any]]) -> None:
        for name in kept.keys() & set(LOGS):
            content = _content(self.path / name)[: kept[name]["bytes"]]
            if self._seal(content) != kept[name]:
                raise Damaged(f"{self.path / name} has changed since it was written")

    @staticmethod
    def _seal(content: bytes) -> dict[str, Any]:
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _whole(self) -> tuple[list[tuple[tuple[int, int], Path]], list[str]]:
        """Checkpoints with (tasks finished, steps done in the next), the latest last; and errors of damaged ones."""
        found, damaged = [], []
        for path in self.checkpoints.glob(f"[!.]*/{checkpoint.MANIFEST}"):
            try:
                values = checkpoint.manifest(path.parent)
                found.append(((values["tasks_done"], values["step"]), path.parent))
            except Damaged as error:
                damaged.append(str(error))
        return sorted(found), sorted(damaged)

    def save(self, tensors: dict[str, dict[str, Any]], values: dict[str, Any], label: str) -> None:
        """Writes a checkpoint. One earlier checkpoint inside a task is kept, in case it is damaged."""
        logs = {name: self._seal(_content(self.path / name)) for name in LOGS}
        checkpoint.save(self.checkpoints / label, tensors, {**values, "logs": logs})
        for other in self.checkpoints.glob(".*"):
            shutil.rmtree(other)
        whole, _ = self._whole()
        inside = [path for (_, step), path in whole if step and path.name != label]
        for other in inside[:-1]:
            durable.discard(other)

    def tidy(self, labels: Collection[str]) -> None:
        """Removes all other checkpoints; a finished run needs none inside a task."""
        for other in self.checkpoints.iterdir():
            if other.name not in labels:
                durable.discard(other)

    def mirror(self, trackers: Sequence[Tracker]) -> None:
        """Gives trackers what is logged, so far and from now on."""
        self.trackers = trackers
        steps, scores = _rows(self.path / STEPS, TrainStep), _rows(self.path / SCORES, StageScore)
        for tracker in trackers:
            tracker.steps([row for _, row in steps])
            for _, row in scores:
                tracker.score(row)

    def conclude(self, results: dict[str, Any]) -> None:
        """Gives trackers the metrics of a finished run."""
        for tracker in self.trackers:
            tracker.metrics(final(results))

    def log_steps(self, rows: Sequence[TrainStep]) -> None:
        _append(self.path / STEPS, rows)
        for tracker in self.trackers:
            tracker.steps(rows)

    def cut_steps(self, stage: int, step: int) -> None:
        """Drops logged steps after the checkpoint that training resumes from; they will be repeated."""
        self._keep(STEPS, TrainStep, lambda row: (row.stage, row.step) <= (stage, step))

    def log_score(self, row: StageScore) -> None:
        _append(self.path / SCORES, [row])
        for tracker in self.trackers:
            tracker.score(row)

    def log_extra(self, row: StageScore) -> None:
        _append(self.path / EXTRA, [row])

    def scores(self, stage: int, log: str = SCORES) -> dict[tuple[int, str], StageScore]:
        """The rows of scores.jsonl, or of extra_scores.jsonl, by (stage, task); drops those of later stages than
        this, from the file too."""
        rows = self._keep(log, StageScore, lambda row: row.stage <= stage)
        return {(row.stage, row.task): row for row in rows}

    def _keep(self, name: str, kind: type[T], wanted: Callable[[T], bool]) -> list[T]:
        """The wanted rows of a log; the file is written anew with them alone."""
        rows = [(line, row) for line, row in _rows(self.path / name, kind) if wanted(row)]
        content = b"".join(line + b"\n" for line, _ in rows)
        if content != _content(self.path / name):
            checkpoint.write_bytes(self.path / name, content)
        return [row for _, row in rows]
