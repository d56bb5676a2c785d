"""What a run starts from, ``--init-from``: found and identified, without loading tensors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import field

from cnext import records
from cnext.errors import UserError, listed, parse_json
from cnext.records import Count, FileName, Record
from cnext.regular_files import LARGEST, read_bytes

CONFIG, MANIFEST, CHECKPOINTS, OPTIMIZER = "config.json", "manifest.json", "checkpoints", "optimizer.safetensors"
CONNECTIONS = "connection_layers.safetensors"
"""Trained parts of the backbone outside a merged model, as ``cnext export`` writes them beside it."""
BLOCK = 2**20


class SourceRecipe(Record):
    """The recipe of a run, as far as it decides what its checkpoints hold."""

    trainable: str = "branches"


class MergedModel(Record):
    """A merged model, whose weights a run has in place of the frozen pretrained ones.

    path: its folder.  sha256: of the files of weights, of config.json and of `CONNECTIONS`.
    """

    path: str
    sha256: str


class SourceRun(Record):
    """config.json of the run that another one starts from, or of an imported adapter."""

    method: str
    hyperparameters: dict[str, Any]
    backbone: str
    tasks: list[FileName]
    recipe: SourceRecipe = field(default_factory=SourceRecipe)
    suite: str | None = None
    budget: str | None = None
    seed: int | None = None
    weights: str | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    merged: MergedModel | None = None


class SourceManifest(Record):
    """A checkpoint's manifest, as far as it identifies the checkpoint. files: name to SHA-256."""

    files: dict[str, str]
    tasks_done: Count
    step: Count


@dataclass(frozen=True)
class InitSource:
    """What ``--init-from`` names.

    Attributes:
        kind: a run's checkpoint, PEFT adapters, a released file, or a whole model that branches were merged into.
        path: what is read: the checkpoint's folder, the folder of the adapters or of the model, or the file.
        sha256: of its content; of a checkpoint without the optimizer's state, so that it is the same for every run that
            agrees to the bit.
        run: the run that the checkpoint is of.
        learnt: the tasks that this run had learnt, in order.
        merged: the model itself, or the one that the run started from.
    """

    kind: Literal["run", "peft", "released", "merged"]
    path: Path
    sha256: str
    run: SourceRun | None = None
    learnt: tuple[str, ...] = ()
    merged: MergedModel | None = None

    @property
    def name(self) -> str:
        """The name of the file or folder; of a checkpoint with that of its run."""
        return f"{self.path.name} of {self.path.parents[1].name}" if self.run else self.path.name


def find(path: Path) -> InitSource:
    """Identifies what a run starts from: see `InitSource`. A run folder is its last checkpoint between tasks.

    Raises:
        UserError: it is none of these, or a checkpoint within a task; or the merged model that a run started from has
            moved or changed, or an export is not as it was written.
    """
    from cnext.adapters import exchange_files, exchange_peft, export_sums

    try:
        if (path / MANIFEST).is_file():
            return _checkpoint(path.resolve())
        if (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir():
            return _checkpoint(_last(path.resolve()))
        export_sums.check(path if path.is_dir() else path.parent, _of_file)
        if exchange_files.is_peft(path):
            there = [file for file in exchange_peft.files(path) if file.is_file()]
            files = {str(file.relative_to(path)): _of_file(file) for file in there}
            return InitSource("peft", path.resolve(), _of_values(files))
        if _is_model(path):
            merged = _merged(path.resolve())
            return InitSource("merged", path.resolve(), merged.sha256, merged=merged)
        file = exchange_files.released_file(path).resolve()
        return InitSource("released", file, _of_file(file))
    except UserError as error:
        raise UserError(f"--init-from {path}: {error}") from error


def check_merged(merged: MergedModel) -> Path:
    """The folder of the merged model that a run started from. Raises UserError where it has moved or changed."""
    path, words = Path(merged.path), "the run trained its branches on the merged model"
    if not _is_model(path):
        raise UserError(f"{words} {path}, and there is none; put it there again")
    if (found := _merged(path).sha256) != merged.sha256:
        raise UserError(f"{words} {path}, which has changed: SHA-256 {merged.sha256} then, {found} now")
    return path


def _merged(folder: Path) -> MergedModel:
    from cnext.backbones.folders import weight_files

    there = [folder / CONFIG, *weight_files(folder), *(f for f in [folder / CONNECTIONS] if f.is_file())]
    return MergedModel(str(folder), _of_values({file.name: _of_file(file) for file in there}))


def _is_model(path: Path) -> bool:
    """Whether it is the folder of a transformers model."""
    try:
        config = parse_json(read_bytes(path / CONFIG, LARGEST))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.keys() & {"model_type", "architectures"})


def _manifest(folder: Path) -> SourceManifest:
    return records.read(folder / MANIFEST, SourceManifest, "give another checkpoint")


def _last(run: Path) -> Path:
    found = {path.parent: _manifest(path.parent) for path in sorted((run / CHECKPOINTS).glob(f"[!.]*/{MANIFEST}"))}
    between = [folder for folder, manifest in found.items() if not manifest.step]
    if not between:
        raise UserError("the run has no checkpoint of a finished task; continue it until one is")
    return max(between, key=lambda folder: found[folder].tasks_done)


def _checkpoint(folder: Path) -> InitSource:
    manifest = _manifest(folder)
    if manifest.step:
        raise UserError(f"the checkpoint is of step {manifest.step} of a task; give one of a finished task")
    run = records.read(folder.parents[1] / CONFIG, SourceRun, "give the folder of a run")
    files = {name: digest for name, digest in manifest.files.items() if name != OPTIMIZER}
    learnt = tuple(map(str, run.tasks[: manifest.tasks_done]))
    if run.merged is not None:
        check_merged(run.merged)
    return InitSource("run", folder, _of_values(files), run, learnt, run.merged)


def _of_values(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _of_file(file: Path) -> str:
    status = file.stat()
    return _of_content(file.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _of_content(file: Path, _size: int, _changed: int) -> str:
    """SHA-256 of a file, read once per size and time of change: the runs of a study share it."""
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def differences(run: SourceRun, method: str, backbone: str, hyperparameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """How a run differs from one that is to take over its state, in lines.

    Returns:
        "state": differences with which its tensors mean something else; "training": those that only training depends
        on, which are weights and rates.
    """
    there, found = run.hyperparameters, {"state": [], "training": []}
    for name, one, other in (("method", run.method, method), ("backbone", run.backbone, backbone)):
        found["state"] += [] if one == other else [f"{name}: {one} there, {other} here"]
    for name, value in hyperparameters.items() if run.method == method else ():
        if name in there and there[name] != value:
            # The scale and what is no weight (a rank, a rule) decide what the tensors are.
            kind = "training" if isinstance(value, float) and name != "scale" else "state"
            found[kind].append(f"{method}.{name}: {there[name]} there, {value} here")
    return found


def check(
    source: InitSource, method: str, backbone: str, hyperparameters: Mapping[str, Any], given: tuple[str, ...] | None
) -> None:
    """Raises UserError where a run cannot take over the state of another run's checkpoint.

    Args:
        given: the tasks that it is to count as learnt; None where nothing is to be trained.
    """
    run = source.run
    if run is None:
        return
    if found := differences(run, method, backbone, hyperparameters)["state"]:
        other = "" if run.method == method else "; cnext export gives its adapter alone, without its method's state"
        raise UserError(f"--init-from {source.path}: the run is another: {listed(found)}{other}")
    if given and source.learnt and given != source.learnt:
        raise UserError(
            f"--init-from {source.path}: the run had learnt {', '.join(source.learnt)}, --init-tasks names "
            f"{', '.join(given)}; give the checkpoint after these tasks, or --init-tasks {' '.join(source.learnt)}"
        )
