"""Power cuts at any moment of a run: the newest checkpoint is found, and nothing that was finished is lost."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import file_operations
import pytest
from training.power_cuts import DOZEN, Cut, Disk, Journal, Operation, journal, killed, lost
from training.toy import copy_suite, rows

from cnext import RunConfig, report, run
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.runs.run_folder import EXTRA, RunFolder
from cnext.runs.schemas import StageScore

ORDER = ("VQAv2", "HQEdit")
Tree = Sequence[tuple[str, bytes | None]]


@dataclass
class Recorded:
    """A run, the operations of which were recorded, and what is in its folder at the end."""

    config: RunConfig
    planned: dict[str, Any]
    journal: Journal

    @property
    def folder(self) -> Path:
        return self.config.folder

    def lines(self, name: str) -> list[bytes]:
        return (self.folder / name).read_bytes().splitlines(keepends=True)


def recorded(config: RunConfig, before: Journal | None = None, disk: Disk | None = None) -> Recorded:
    """Runs a configuration. before, disk: what happened in its folder until now, and what is in it."""
    config.folder.mkdir(parents=True, exist_ok=True)
    found = Journal(config.folder)
    if before is not None and disk is not None:
        found.adopt(before, disk)
    save, score = RunFolder.save, RunFolder.log_score

    def saved(self: RunFolder, tensors: Any, values: dict[str, Any], label: str) -> None:
        save(self, tensors, values, label)
        found.mark("saved", values["tasks_done"], values["step"])

    def scored(self: RunFolder, row: StageScore) -> None:
        score(self, row)
        found.mark("scored", row.stage, row.task)

    with pytest.MonkeyPatch.context() as patch, file_operations.watched(config.folder, found):
        patch.setattr(RunFolder, "save", saved)
        patch.setattr(RunFolder, "log_score", scored)
        # The report takes longer than the run, and is written last.
        patch.setattr(report, "write_report", lambda run: (run / "report.html", run / "report.md"))
        run(config)
    return Recorded(config, plan(config).as_dict(), found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path, data: Path) -> Recorded:
    """Two tasks of three steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("power")
    steps = {"steps": dict.fromkeys(ORDER, 3)}
    suite = copy_suite(toy_suite, folder / "micro", train_samples=8, test_samples=2, batch_size=2, **steps)
    shared = {"suite": str(suite), "data": data, "order": ",".join(ORDER), "device": "cpu", "checkpoint_interval": 1}
    shared |= {"method": "lora", "hyperparameters": {"rank": 1}}
    return recorded(RunConfig(out=folder / "runs", **shared))


def put(tree: Tree, path: Path, store: Path | None = None) -> None:
    """Makes a folder in this state. store: keeps files as links, since what a run has written, except for the logs, it
    never changes."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name, content in tree:
        if content is None:
            os.mkdir(path / name)
            continue
        kept = None if store is None or name.endswith(".jsonl") else store / str(hash(content))
        if kept and kept.exists():
            os.link(kept, path / name)
            continue
        (path / name).write_bytes(content)
        if kept:
            os.link(path / name, kept)


class States:
    """States of a run's folder after a power cut, each looked at once."""

    def __init__(self, whole: Recorded, ended: Recorded, scratch: Path) -> None:
        self.whole, self.ended, self.scratch = whole, ended, scratch
        self.seen: set[int] = set()
        self.trees: list[Tree] = []
        self.count = 0
        marks = [(place, one) for place, one in enumerate(ended.journal.operations) if one.what == "mark"]
        self.saved = [(place, one.marked) for place, one in marks if one.name == "saved"]
        self.scored = [(place, one.marked) for place, one in marks if one.name == "scored"]
        self.logs = {name: self.whole.lines(name) for name in ("train.jsonl", "scores.jsonl", EXTRA)}

    def look(self, cuts: Iterator[Cut]) -> None:
        for at, kept in cuts:
            self.count += 1
            disk = Disk()
            for one in kept:
                disk.apply(one)
            saved = max((marked for place, marked in self.saved if place < at), default=(0, 0))
            scored = [marked for place, marked in self.scored if place < at]
            tree = tuple(disk.tree(self.ended.journal.directories))
            key = hash((tree, saved, len(scored)))
            if key not in self.seen:
                self.seen.add(key)
                self.trees.append(tree)
                self.check(tree, saved, scored)

    def check(self, tree: Tree, saved: tuple[int, int], scored: list[tuple[int, str]]) -> None:
        """Opens the folder as a run that resumes does."""
        path, said = self.scratch / "state", []
        put(tree, path, self.scratch)
        with pytest.MonkeyPatch.context() as patch, closing(RunFolder(path, self.ended.planned)) as folder:
            # Checksums are checked before tensors are made, which takes longer.
            patch.setattr("safetensors.torch.load", lambda content: {})
            found = folder.furthest(said.append)
            values = found[2] if found else {"tasks_done": 0, "step": 0}
            done, step = values["tasks_done"], values["step"]
            assert not said
            assert (done, step) >= saved, "what was saved is lost"
            folder.cut(done, (done + 1, step) if step else (done, sys.maxsize if done else 0), said.append)
            scores = {(row.stage, row.task): row for row in folder.scored.rows}
        assert not said
        assert {key for key in scored if key[0] <= done} <= scores.keys(), "what was scored is lost"
        steps = [line for line in self.logs["train.jsonl"] if self.trained(line, done, step)]
        assert (path / "train.jsonl").read_bytes() == b"".join(steps) if steps else True
        for name in ("scores.jsonl", EXTRA):
            if (path / name).is_file():
                assert b"".join(self.logs[name]).startswith((path / name).read_bytes())
        for stage, task in scores:
            answers = f"predictions/{stage}_{scores[stage, task].trained}/{task}.jsonl"
            for name in (answers, *[row["image"] for row in rows(self.whole.folder / answers) if row["image"]]):
                assert (path / name).read_bytes() == (self.whole.folder / name).read_bytes(), name
        for file in path.glob("[!.]*.json"):
            json.loads(file.read_bytes())

    @staticmethod
    def trained(line: bytes, done: int, step: int) -> bool:
        row = json.loads(line)
        return (row["stage"], row["step"]) <= ((done + 1, step) if step else (done, sys.maxsize))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: states are many, and nothing in them has to last."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as made:
        yield Path(made)


def cuts(operations: list[Operation], each: int, since: int = 0) -> Iterator[Cut]:
    """Under all four models, of moments after the first ``since`` operations."""
    draw = random.Random(0)
    models = (killed(operations, draw), journal(operations, draw, each))
    models += (lost(operations, draw, each, DOZEN), lost(operations, draw, each, None))
    return (cut for cut in itertools.chain(*models) if cut[0] >= since)


def resumed(whole: Recorded, tree: Tree, out: Path) -> None:
    """Runs to the end from a state, as if nothing had been."""
    config = replace(whole.config, out=out)
    put(tree, config.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda run: (run / "report.html", run / "report.md"))
        run(config)
    same_end(config, whole)


def same_end(config: RunConfig, whole: Recorded) -> None:
    for name in ("results.json", "scores.jsonl", "train.jsonl", "config.json"):
        assert (config.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_after_a_power_cut_the_newest_checkpoint_is_found(whole: Recorded, scratch: Path) -> None:
    """A sample of the states of the test below."""
    States(whole, whole, scratch).look(itertools.islice(cuts(whole.journal.operations, 1), 0, None, 5))


def test_a_state_without_the_syncs_is_noticed(whole: Recorded, scratch: Path) -> None:
    """The test above fails where no folder is synced."""
    found = whole.journal
    operations = [one for one in found.operations if one.what != "fsync" or one.inode not in found.directories]
    blind = Journal(whole.folder)
    blind.operations, blind.directories = operations, found.directories
    with pytest.raises((AssertionError, UserError)):
        States(whole, replace(whole, journal=blind), scratch).look(lost(operations, random.Random(0), 1, None))


@pytest.mark.slow
def test_ten_thousand_states_after_a_power_cut(whole: Recorded, scratch: Path) -> None:
    states = States(whole, whole, scratch)
    states.look(cuts(whole.journal.operations, 12))
    assert states.count >= 10_000
    draw = random.Random(0)
    for number, tree in enumerate(draw.sample(states.trees, 5)):
        resumed(whole, tree, whole.config.out.with_name(f"resumed-{number}"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scores.jsonl", "train.jsonl", "checkpoints"])
def test_a_power_cut_after_a_run_was_killed_and_resumed(what: str, whole: Recorded, scratch: Path) -> None:
    """Killed after a row, or a checkpoint's name, was written and before it was synced."""
    made = whole.journal
    inode = whole.journal.inode(what)
    written = [place for place, one in enumerate(made.operations) if one.inode == inode and one.what != "fsync"]
    at = written[len(written) * 2 // 3] + 1
    disk = Disk()
    for one in made.operations[:at]:
        disk.apply(one)
    before = Journal(whole.folder)
    before.operations, before.directories, before.made = made.operations[:at], made.directories, made.made
    config = replace(whole.config, out=whole.config.out.with_name(f"killed-{what}"))
    put(tuple(disk.tree(made.directories)), config.folder)
    ended = recorded(config, before, disk)
    same_end(config, whole)
    States(whole, ended, scratch).look(itertools.islice(cuts(ended.journal.operations, 1, at), 0, None, 2))
