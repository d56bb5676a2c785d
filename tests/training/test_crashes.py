"""Runs that are ended from outside at any moment: what was finished is not lost, and the end is the same to the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training.faults import FULL, INTERRUPT, KILL, MEMORY, STATUS, TERM, TWICE, damage, go

from cnext import RunConfig
from cnext.runs import checkpoint
from cnext.runs.checkpoint import Damaged

ORDER = ("VQAv2", "HQEdit")
STEPS, BLOCK = 4, 2
RESULTS = ("results.json", "scores.jsonl", "train.jsonl", "config.json")
Make = Callable[[str], RunConfig]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path, data: Path) -> Make:
    """A configuration of two tasks of four steps, a block of two, in a folder of its own."""
    folder = tmp_path_factory.mktemp("crashes")
    suite = folder / "micro"
    suite.mkdir()
    for path in toy_suite.iterdir():
        (suite / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((suite / "suite.json").read_text())
    manifest["budgets"]["default"] |= {"train_samples": 8, "test_samples": 2, "batch_size": 2}
    (suite / "suite.json").write_text(json.dumps(manifest))
    shared = {"suite": str(suite), "data": data, "order": ",".join(ORDER), "device": "cpu", "block_steps": BLOCK}
    return lambda name: RunConfig(out=folder / name, method="mage-pull", hyperparameters={"rank": 1}, **shared)


@pytest.fixture(scope="module")
def whole(make: Make) -> RunConfig:
    """A run that nothing ended before its time."""
    made = make("whole")
    status, said = go(made)
    assert status == 0, said
    return made


def work(config: RunConfig) -> list[int]:
    """The number of every step that was done, counted over both tasks from 1, in the order in which they were done."""
    file = config.out / "work"
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return [ORDER.index(task) * STEPS + int(step) for task, step in lines]


def same_end(config: RunConfig, whole: RunConfig) -> None:
    for name in RESULTS:
        assert (config.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    predictions = sorted(path.relative_to(whole.folder) for path in whole.folder.rglob("predictions/**/*.*"))
    for path in predictions:
        assert (config.folder / path).read_bytes() == (whole.folder / path).read_bytes(), path
    names = {path.name for path in (config.folder / "checkpoints").iterdir()}
    assert names == {"1_VQAv2", "2_HQEdit"}


KINDS = (KILL, KILL, TERM, INTERRUPT, FULL, MEMORY)
SAID = {FULL: "no space left on the disk", MEMORY: "out of memory", TERM: "stopped by SIGTERM", INTERRUPT: "by SIGINT"}


@pytest.mark.parametrize("seed", range(9))
def test_ended_again_and_again_it_ends_with_the_same_bits(seed: int, make: Make, whole: RunConfig) -> None:
    """Ended six times at random moments and in random ways, 54 times in all, and then left alone."""
    draw, made, ended = random.Random(seed), make(f"ended-{seed}"), 0
    while ended < 6:
        kind, done = draw.choice(KINDS), len(work(made))
        status, said = go(made, kind, draw.randint(1, 40))
        if status == 0 and "stopped" not in said:
            # It was faster than its end. Once more, from the beginning.
            same_end(made, whole)
            shutil.rmtree(made.out)
            continue
        ended += 1
        assert status == STATUS[kind], said
        assert SAID.get(kind, "") in said
        assert "Traceback" not in said
        steps = work(made)
        if done and len(steps) > done:
            assert steps[done] > max(steps[:done]) - BLOCK, "more than the last block is done again"
    status, said = go(made)
    assert status == 0, said
    assert len(work(made)) <= 2 * STEPS + BLOCK * ended
    same_end(made, whole)


def checkpoints(config: RunConfig) -> list[Path]:
    """The whole ones, the furthest last."""
    found = []
    for path in config.folder.glob("checkpoints/[!.]*"):
        try:
            _, values = checkpoint.load(path)
        except Damaged:
            continue
        found.append((values["tasks_done"], values["step"], path))
    return [path for _, _, path in sorted(found)]


@pytest.mark.parametrize("cut", [True, False], ids=["cut short", "a bit flipped"])
@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_checkpoint_is_never_read_as_good(seed: int, cut: bool, make: Make, whole: RunConfig) -> None:
    """It is named, the one before it is gone on from, and the end is the same."""
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
        assert f"resuming from {found[-2].name}; later steps are repeated" in said
        assert f"going on from {found[-2].name}" in said
    assert damaged >= 2
    assert go(made)[0] == 0
    same_end(made, whole)


@pytest.mark.parametrize("name", ["train.jsonl", "scores.jsonl"])
def test_a_log_that_was_changed_is_not_gone_on_with(name: str, make: Make) -> None:
    """A figure of it is another: no checkpoint has that log's checksum, and the run stops before it adds to it."""
    made = make(f"changed-{name}")
    go(made, KILL, 70)
    assert checkpoints(made)
    path = made.folder / name
    path.write_text(path.read_text().replace("5", "6", 1))
    status, said = go(made)
    assert status == 2
    assert f"no checkpoint of this run is intact:\n{path} has changed since it was written\ndelete {made.folder}" in said


def test_the_interrupt_key_twice_leaves_at_once(make: Make, whole: RunConfig) -> None:
    made = make("twice")
    status, said = go(made, TWICE, 40)
    assert status == 130
    assert "SIGINT: saving at the end of this step; interrupt again to leave at once" in said
    assert "interrupted; the same command goes on after the last saved block" in said
    assert json.loads((made.folder / ".heartbeat.json").read_text())["state"] == "stopped"
    assert go(made)[0] == 0
    same_end(made, whole)


def test_after_a_fallback_the_scores_of_later_stages_are_made_again(make: Make, whole: RunConfig) -> None:
    made = make("fallback")
    shutil.copytree(whole.out, made.out)
    damage(made.folder / "checkpoints" / "2_HQEdit" / "adapters.safetensors", 0.5, cut=False)
    status, said = go(made)
    assert status == 0, said
    assert "resuming from 1_VQAv2" in said
    assert "after 2 HQEdit" in said
    same_end(made, whole)
