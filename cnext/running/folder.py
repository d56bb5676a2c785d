"""A run's folder: its configuration, its append-only logs, its checkpoints, and where to go on from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from cnext.errors import UserError
from cnext.running import checkpoint


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"  {path}: {json.dumps(old)} there, {json.dumps(new)} asked for"]


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an append-only log, without a last line that an interruption cut short."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class RunFolder:
    """Opens (or makes) the folder of one run.

    Raises UserError where the folder holds results of another configuration, naming every difference. A configuration
    that stopped before its first result (at bad data, say) is replaced: nothing is lost with it.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        file = path / "config.json"
        if file.is_file():
            try:
                old = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is not JSON ({error}); give another --out or delete the folder") from error
            changed = _differences(old, config)
            if changed and (path / "scores.jsonl").exists():
                listed = "\n".join(changed)
                raise UserError(
                    f"{path} holds a run of another configuration:\n{listed}\ngive another --out or delete the folder"
                )
        elif path.is_dir() and any(not other.name.startswith(".") for other in path.iterdir()):
            raise UserError(f"{path} is not empty and holds no config.json; give another --out")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        with ExitStack() as undo:
            undo.callback(self.close)
            checkpoint.write_json(file, config)
            self.checkpoints.mkdir(exist_ok=True)
            undo.pop_all()

    def _locked(self) -> IO[str]:
        """The open lock file. The system lets go of it with the process, however that ends."""
        lock = open(self.path / ".lock", "w")  # noqa: SIM115 (closed by close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise UserError(f"another process is running in {self.path}; wait for it or give another --out") from error
        return lock

    def close(self) -> None:
        self._lock.close()

    def latest(self) -> Path | None:
        """The checkpoint to go on from: the one that is furthest, finished ones only."""
        found = [path.parent for path in self.checkpoints.glob(f"[!.]*/{checkpoint.MANIFEST}")]
        return max(found, key=lambda path: self.position(path), default=None)

    def position(self, path: Path) -> tuple[int, int]:
        """(tasks finished, steps done in the one under way) of a checkpoint."""
        values = checkpoint.manifest(path)
        return (values["tasks_done"], values["step"])

    def save(self, tensors: dict[str, dict[str, Any]], values: dict[str, Any], label: str) -> None:
        """Writes a checkpoint, then removes those inside a task, which it makes needless."""
        checkpoint.save(self.checkpoints / label, tensors, values)
        for other in self.checkpoints.iterdir():
            if other.name != label and (other.name.startswith(".") or "_step" in other.name):
                shutil.rmtree(other)

    def log_steps(self, rows: list[dict[str, Any]]) -> None:
        _append(self.path / "train.jsonl", rows)

    def cut_steps(self, stage: int, step: int) -> None:
        """Drops logged steps after the checkpoint that training goes on from: they will be done again."""
        rows = [row for row in _whole_rows(self.path / "train.jsonl") if (row["stage"], row["step"]) <= (stage, step)]
        checkpoint.write_text(self.path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log_score(self, row: dict[str, Any]) -> None:
        _append(self.path / "scores.jsonl", [row])

    def scores(self) -> dict[tuple[int, str], dict[str, Any]]:
        """The rows of scores.jsonl by (stage, task); drops a last line that was cut short, from the file too."""
        path = self.path / "scores.jsonl"
        rows = _whole_rows(path)
        if path.is_file():
            checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return {(row["stage"], row["task"]): row for row in rows}
