"""Run folder: configuration, append-only logs, checkpoints, and the checkpoint to resume from."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from cnext import durable
from cnext.config.plan import completed
from cnext.errors import RESUME, UserError, parse_json
from cnext.regular_files import read_bytes
from cnext.runs import checkpoint, data_file, fingerprint, results_file, schemas, seals
from cnext.runs.checkpoint import Damaged
from cnext.runs.logs import Log
from cnext.runs.schemas import EXTRA, SCORES, StageScore, TrainStep
from cnext.runs.trackers.base import Tracker, final
from cnext.tasks.base import Sample
from cnext.tasks.data_digest import DataDigest

STEPS = "train.jsonl"
RESULTS, ENVIRONMENT, LEFT_OUT = "results.json", "environment.json", "left_out.json"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"  {path}: {json.dumps(old)} there, {json.dumps(new)} requested"]


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
        if isinstance(old, dict):
            old = completed({key: value for key, value in old.items() if key != seals.SEAL}, config)
        changed = _differences(old, config)
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
    """Opens or makes the folder of a run. Raises UserError as `check_free`, and while another process uses it.

    Attributes:
        run: its name, which all seals have; None where it was begun by an earlier version, without seals.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.trackers: Sequence[Tracker] = ()
        check_free(path, config)
        durable.make_folder(path)
        self._lock = self._locked()
        with ExitStack() as undo:
            undo.callback(self.close)
            self.run = self._name(config)
            self.write_json(seals.CONFIG, data_file.kept(config, path / seals.CONFIG))
            durable.make_folder(self.checkpoints)
            durable.restore(self.checkpoints)
            # What the process before was writing when it was killed, and resuming reads.
            for name in (STEPS, SCORES, EXTRA):
                if (path / name).is_file():
                    durable.sync(path / name)
            self.steps = Log(path / STEPS, TrainStep, self.run)
            self.scored = Log(path / SCORES, StageScore, self.run)
            self.extra = Log(path / EXTRA, StageScore, self.run)
            self.logs: dict[str, Log[Any]] = {log.path.name: log for log in (self.steps, self.scored, self.extra)}
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

    def _name(self, config: dict[str, Any]) -> str | None:
        """The run's name: that of config.json where the run was begun; a new one where that has lost it."""
        begun = _content(self.path / SCORES)
        with suppress(seals.Changed):
            if begun and ((there := seals.run_of(self.path)) or not seals.has_seal(begun.partition(b"\n")[0])):
                return there
        return seals.run_name(config)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        self._lock.close()

    def check(self) -> None:
        """Raises UserError where the folder or its lock was moved or deleted, so that nothing is written elsewhere."""
        if not durable.still_there(self.path / ".lock", self._lock.fileno()):
            raise UserError(
                f"{self.path} was moved or deleted while the run was under way, or its file .lock was, so that the run "
                f"ends here: move it back; {RESUME}"
            )

    def write_json(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Writes a JSON file with its seal. Returns its content."""
        self.check()
        values = seals.sealed(values, name, self.run)
        checkpoint.write_json(self.path / name, values)
        return values

    def note_left_out(self, rows: dict[str, Any]) -> None:
        """Writes left_out.json, see `LeftOut.as_dict`; no file where nothing is left out.

        Raises: UserError where the run has results with other rows left out, so that its samples were others.
        """
        file = self.path / LEFT_OUT
        try:
            old = schemas.read(file, dict[str, Any]) if file.is_file() else {}
        except seals.Changed:
            # Written anew: `note_data` checks that the data are the same.
            old = rows
        old = {key: value for key, value in old.items() if key != seals.SEAL}
        if old != rows and self.scored.rows:
            there = f"those in {LEFT_OUT} there" if old else "none"
            raise UserError(
                f"{self.path} holds a run that left out other rows of the data ({there}): the data, or what "
                "cnext reads of them, have changed since; restore them, give another --out or delete the folder"
            )
        if rows:
            self.write_json(LEFT_OUT, rows)
        else:
            file.unlink(missing_ok=True)

    def note_data(self, data: DataDigest, samples: Mapping[str, Mapping[str, Sequence[Sample]]]) -> str:
        """`data_file.keep`: digests of the data, which must be those that the run's results come from."""
        begun = any(_content(self.path / name) for name in self.logs) or any(self.checkpoints.glob("[!.]*"))
        return data_file.keep(self.path, data, samples, begun, self.write_json)

    def fingerprints(self, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """The environments that the scores so far come from. Where it is not known, all of its fields are unknown."""
        if not self.scored.rows:
            return []
        try:
            known = fingerprint.of_processes(self.path / ENVIRONMENT)
            if known or self.run is None:
                return known
            problem = f"{self.path / ENVIRONMENT} is missing"
        except UserError as error:
            problem = str(error)
        with suppress(UserError):
            found = (results_file.read(self.path / RESULTS) or {}).get("fingerprint")
            if found:
                say(f"warning: {problem}: the environment of the scores so far is that of {RESULTS}")
                return [{name: value for name, value in found.items() if name not in ("sha256", fingerprint.DATA)}]
        say(f"warning: {problem}: the environment of the scores so far counts as {fingerprint.UNKNOWN!r}")
        return [dict.fromkeys(fingerprint.PACKAGES, fingerprint.UNKNOWN)]

    def furthest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(path, tensors, values) of the latest intact checkpoint, to resume from; None if there is none.

        Checkpoints that are damaged, or whose logs have changed since, are skipped and named.

        Raises: UserError where there are checkpoints and none is intact.
        """
        found, damaged = self._whole()
        for _, path in reversed(found):
            try:
                tensors, values = checkpoint.load(path)
                values.pop("run", None)
                for name, kept in values.pop("logs", {}).items():
                    if name in self.logs:
                        self.logs[name].check(kept)
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
        self.check()
        logs = {name: log.checksum() for name, log in self.logs.items()}
        run = {} if self.run is None else {"run": self.run}
        checkpoint.save(self.checkpoints / label, tensors, {**values, **run, "logs": logs})
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
        for tracker in trackers:
            tracker.steps(self.steps.rows)
            for row in self.scored.rows:
                tracker.score(row)

    def conclude(self, results: dict[str, Any]) -> None:
        """Gives trackers the metrics of a finished run."""
        for tracker in self.trackers:
            tracker.metrics(final(results))

    def log_steps(self, rows: Sequence[TrainStep]) -> None:
        self.check()
        self.steps.append(rows)
        for tracker in self.trackers:
            tracker.steps(rows)

    def log_score(self, row: StageScore) -> None:
        self.check()
        self.scored.append([row])
        for tracker in self.trackers:
            tracker.score(row)

    def log_extra(self, row: StageScore) -> None:
        self.check()
        self.extra.append([row])

    def cut(self, stage: int, step: tuple[int, int], say: Callable[[str], None]) -> None:
        """Drops what the logs have after the state that the run resumes from, and what was changed; it is repeated.

        Args: stage: the last that is scored.  step: (stage, step) of the last step that is kept.
        """
        for log in self.logs.values():
            if log.damage:
                say(f"warning: {log.damage}; it and what follows are measured anew")
        lost = any(row.stage > stage for row in self.scored.rows) or self.scored.damage
        if lost:
            # They have scores that are dropped here, until the next stage is done.
            (self.path / RESULTS).unlink(missing_ok=True)
        self.steps.keep(lambda row: (row.stage, row.step) <= step)
        self.scored.keep(lambda row: row.stage <= stage)
        self.extra.keep(lambda row: row.stage <= stage)
