"""Runs that are ended at any moment: no checkpoint is lost, and the results are the same bits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training.faults import FULL, INTERRUPT, KILL, MEMORY, STATUS, TERM, TWICE, damage, go
from training.toy import copy_suite

from cnext import RunConfig
from cnext.errors import RESUME
from cnext.runs import checkpoint
from cnext.runs.checkpoint import Damaged

ORDER = ("VQAv2", "HQEdit")
STEPS, INTERVAL = 4, 2
RESULTS = ("results.json", "scores.jsonl", "train.jsonl", "config.json")
Make = Callable[[str], RunConfig]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path, data: Path) -> Make:
    """A configuration of two tasks of four steps with a checkpoint every two, in a folder of its own."""
    folder = tmp_path_factory.mktemp("crashes")
    suite = copy_suite(toy_suite, folder / "micro", train_samples=8, test_samples=2, batch_size=2)
    shared = {"suite": str(suite), "data": data, "order": ",".join(ORDER), "device": "cpu"}
    shared |= {"method": "mage-pull", "hyperparameters": {"rank": 1}, "checkpoint_interval": INTERVAL}
    return lambda name: RunConfig(out=folder / name, **shared)


@pytest.fixture(scope="module")
def whole(make: Make) -> RunConfig:
    """A run without interruption."""
    made = make("whole")
    status, said = go(made)
    assert status == 0, said
    return made


def work(config: RunConfig) -> list[int]:
    """The number of every step done, counted over both tasks from 1, in the order in which they were done."""
    file = config.out / "work"
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return [ORDER.index(task) * STEPS + int(step) for task, step in lines]


def same_end(config: RunConfig, whole: RunConfig) -> None:
    predictions = sorted(path.relative_to(whole.folder) for path in whole.folder.rglob("predictions/**/*.*"))
    assert predictions
    for path in (*RESULTS, *predictions):
        assert (config.folder / path).read_bytes() == (whole.folder / path).read_bytes(), path
    assert {path.name for path in (config.folder / "checkpoints").iterdir()} == {"1_VQAv2", "2_HQEdit"}


KINDS = (KILL, KILL, TERM, INTERRUPT, FULL, MEMORY)
SAID = {FULL: "no space left on the disk", MEMORY: "out of memory", TERM: "stopped by SIGTERM", INTERRUPT: "by SIGINT"}


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_interrupted_runs_end_with_the_same_bits(seed: int, make: Make, whole: RunConfig) -> None:
    """Interrupted six times at random moments and in random ways, 30 times in all, and then not any more."""
    draw, made, ended = random.Random(seed), make(f"ended-{seed}"), 0
    while ended < 6:
        kind, done = draw.choice(KINDS), len(work(made))
        status, said = go(made, kind, draw.randint(1, 40))
        if status == 0 and "stopped" not in said:
            # It finished first. Once more, from the beginning.
            same_end(made, whole)
            shutil.rmtree(made.out)
            continue
        ended += 1
        assert status == STATUS[kind], said
        assert SAID.get(kind, "") in said
        assert kind == KILL or RESUME in said
        assert "Traceback" not in said
        steps = work(made)
        if done and len(steps) > done:
            assert steps[done] > max(steps[:done]) - INTERVAL, "steps before the last checkpoint are done again"
    status, said = go(made)
    assert status == 0, said
    assert len(work(made)) <= 2 * STEPS + INTERVAL * ended
    same_end(made, whole)


def checkpoints(config: RunConfig) -> list[Path]:
    """The undamaged ones, the furthest last."""
    found = []
    for path in config.folder.glob("checkpoints/[!.]*"):
        try:
            _, values = checkpoint.load(path)
        except Damaged:
            continue
        found.append((values["tasks_done"], values["step"], path))
    return [path for _, _, path in sorted(found)]


@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "a bit flipped"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_not_used(seed: int, cut: bool, make: Make, whole: RunConfig) -> None:
    """It is named, the run resumes from the one before it, and the results are the same."""
    draw, made, damaged = random.Random(seed), make(f"damaged-{seed}-{cut}"), 0
    for _ in range(4):
        go(made, KILL, draw.randint(30, 60))
        found = checkpoints(made)
        if len(found) < 2:
            continue
        damage(draw.choice(sorted(found[-1].iterdir())), draw.random(), cut)
        damaged += 1
        _, said = go(made, KILL, draw.randint(10, 40))
        assert f"{found[-1]}" in said
        assert f"falling back to {found[-2].name}; later steps are repeated" in said
        assert f"resuming from {found[-2].name}" in said
    assert damaged >= 2
    assert go(made)[0] == 0
    same_end(made, whole)


@pytest.mark.parametrize("name", ["train.jsonl", "scores.jsonl"])
def test_a_changed_log_stops_the_run(name: str, make: Make) -> None:
    """With one figure changed no checkpoint has that log's checksum, and the run stops before it adds to it."""
    made = make(f"changed-{name}")
    go(made, KILL, 70)
    assert checkpoints(made)
    path = made.folder / name
    path.write_text(path.read_text().replace("5", "6", 1))
    before = path.read_bytes()
    status, said = go(made)
    assert status == 2
    assert f"no checkpoint of this run is intact:\n{path}:" in said
    assert f" is not as it was written (its seal is another)\ndelete {made.folder} to start again" in said
    assert path.read_bytes() == before


def test_a_second_interrupt_leaves_at_once(make: Make, whole: RunConfig) -> None:
    made = make("twice")
    status, said = go(made, TWICE, 40)
    assert status == 130
    assert "SIGINT: saving at the end of this step; interrupt again to leave at once" in said
    assert f"interrupted twice, left at once; {RESUME}" in said
    assert json.loads((made.folder / ".heartbeat.json").read_text())["state"] == "stopped"
    assert go(made)[0] == 0
    same_end(made, whole)


def test_scores_after_a_damaged_checkpoint_are_remade(make: Make, whole: RunConfig) -> None:
    made = make("fallback")
    shutil.copytree(whole.out, made.out)
    damage(made.folder / "checkpoints" / "2_HQEdit" / "adapters.safetensors", 0.5, cut=False)
    status, said = go(made)
    assert status == 0, said
    assert "resuming from 1_VQAv2" in said
    assert "after 2 HQEdit" in said
    same_end(made, whole)


def test_a_run_folder_of_an_earlier_version_is_resumed(make: Make, whole: RunConfig) -> None:
    """Its config.json has the checkpoint interval under its old name, and lacks a hyperparameter."""
    made = make("earlier")
    go(made, KILL, 70)
    assert checkpoints(made)
    path = made.folder / "config.json"
    values = json.loads(path.read_text().replace("checkpoint_interval", "block_steps"))
    del values["hyperparameters"]["lr_factor"]
    path.write_text(json.dumps(values))
    status, said = go(made)
    assert status == 0, said
    assert "resuming from" in said
    same_end(made, whole)
