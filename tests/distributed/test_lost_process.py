"""A lost process, and signals during evaluation: nothing hangs, and nothing saved is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from distributed.members import End, go
from training.faults import KILL, TERM
from training.toy import copy_suite, rows

from cnext import RunConfig
from cnext.errors import RESUME
from cnext.runs import checkpoint

ORDER, STEPS = "VQAv2,HQEdit", 4
RESULTS = ("results.json", "scores.jsonl", "extra_scores.jsonl", "separability.json", "train.jsonl", "config.json")
Make = Callable[[str], RunConfig]
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
OPTIMIZERS = {"replicated": {}} | ({"partitioned": ZERO} if find_spec("deepspeed") else {})
"""The optimizer's moments are replicated or partitioned."""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path, data: Path) -> Make:
    """A configuration of two tasks of four steps of six samples, with a checkpoint every two steps."""
    folder = tmp_path_factory.mktemp("lost")
    suite = copy_suite(toy_suite, folder / "micro", train_samples=12, test_samples=3, batch_size=6)
    shared = {"suite": str(suite), "data": data, "order": ORDER, "device": "cpu", "checkpoint_interval": 2}
    return lambda name: RunConfig(out=folder / name, method="mage-pull", hyperparameters={"rank": 1}, **shared)


def finished(config: RunConfig, processes: int) -> RunConfig:
    """A run begun or continued in so many processes, which all end well."""
    assert [member.status for member in go(config, processes)] == [0] * processes
    return config


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole(request: pytest.FixtureRequest, make: Make) -> tuple[int, RunConfig]:
    """The number of processes, and a run in them without interruption."""
    return request.param, finished(make(f"whole-{request.param}"), request.param)


def events(config: RunConfig) -> list[str]:
    """What happened on rank 0 of a run without interruption, in order."""
    return (config.out / "events-0").read_text().split()


def same_end(config: RunConfig, whole: RunConfig) -> None:
    for name in RESULTS:
        assert (config.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    predictions = sorted(path.relative_to(whole.folder) for path in whole.folder.rglob("predictions/**/*.*"))
    assert predictions
    for path in predictions:
        assert (config.folder / path).read_bytes() == (whole.folder / path).read_bytes(), path


@pytest.fixture(scope="module")
def of_two(make: Make) -> RunConfig:
    return finished(make("of-two"), 2)


LOST = [
    (0, 0, "step"),
    *(pytest.param(*lost, marks=pytest.mark.slow) for lost in ((1, 1, "step"), (0, 0, "answer"), (1, 1, "answer"))),
]


@pytest.mark.parametrize(("seed", "victim", "event"), LOST, ids=lambda value: str(value))
def test_the_others_end_when_one_is_lost(seed: int, victim: int, event: str, make: Make, of_two: RunConfig) -> None:
    """Killed at a random step or answer: the other names the lost rank and ends; resumed, both give the same bits."""
    made = make(f"lost-{seed}-{event}")
    moment = random.Random(seed).randint(1, 4 * STEPS if event == "step" else 5)
    members = go(made, 2, End(KILL, moment, (event,), victim))
    other = members[1 - victim]
    assert members[victim].status == -9
    assert other.status == 2, other.said
    assert f"error: rank {victim} of 2 was lost" in other.said
    assert f"everything up to the last checkpoint is saved; {RESUME}" in other.said
    assert "Traceback" not in other.said
    same_end(finished(made, 2), of_two)


@pytest.mark.slow
def test_both_survivors_of_three_name_the_lost_rank(make: Make) -> None:
    """Also the one that waited for the other survivor."""
    members = go(make("of-three"), 3, End(KILL, 5, ("step",), 1))
    for other in (members[0], members[2]):
        assert other.status == 2, other.said
        assert "error: rank 1 of 3 was lost" in other.said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KILL, TERM])
def test_answers_of_finished_tasks_are_kept(kind: str, make: Make, whole: tuple[int, RunConfig]) -> None:
    """Ended at the second of the last stage's two tasks: the first one's answers are kept, and not generated again."""
    processes, expected = whole
    made = make(f"evaluated-{processes}-{kind}")
    members = go(made, processes, End(kind, events(expected).count("answer"), ("answer",), processes - 1))
    assert members[-1].status == {KILL: -9, TERM: 0}[kind], members[-1].said
    kept = made.folder / "predictions" / "2_HQEdit" / "VQAv2.jsonl"
    written = kept.stat().st_mtime_ns
    assert not kept.with_name("HQEdit.jsonl").exists()
    for member in go(made, processes):
        assert member.status == 0, member.said
        assert (member.events["answer"], "step" in member.events) == (1, False)
    assert kept.stat().st_mtime_ns == written
    same_end(made, expected)


def test_a_signal_while_rank_0_saves_stops_all_ranks(make: Make, of_two: RunConfig) -> None:
    """Rank 0 receives it while it writes a checkpoint, the second file after the first steps, and the other waits."""
    made, before = make("while-writing"), events(of_two)
    before = before[: before.index("step")].count("half")
    members = go(made, 2, End(TERM, before + 2, ("half",)))
    for member in members:
        assert member.status == 0, member.said
        assert "stopped by SIGTERM: saved after step 2 of 4 of VQAv2" in member.said
    same_end(finished(made, 2), of_two)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_resumes(optimizer: str, processes: int, make: Make, of_two: RunConfig) -> None:
    """From a checkpoint of two processes in the middle of a task, which has the optimizer's moments."""
    made = make(f"other-{processes}-{optimizer}")
    go(made, 2, End(KILL, 7, ("step",), 1), **OPTIMIZERS[optimizer])
    tensors, values = checkpoint.load(made.folder / "checkpoints" / "1_VQAv2_step2")
    assert values["step"] == 2
    moments = [tensor for name, tensor in tensors["optimizer"].items() if name.startswith("exp_avg_sq:")]
    assert sum(map(torch.Tensor.numel, moments)) == values["ledger"]["trained"]["VQAv2"]["parameters"]
    for member in go(made, processes, **OPTIMIZERS[optimizer]):
        assert member.status == 0, member.said
        assert member.events["step"] == 2 * (2 * STEPS - 2), "two steps are not done again"
    losses = [[row["loss"] for row in rows(config.folder / "train.jsonl")] for config in (made, of_two)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
