"""What wandb's own library writes offline holds what the logs hold, each row once, however often a run is resumed."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from runs import wandb_files
from runs.test_tensorboard import ENDS, score, step

from cnext.runs.trackers.wandb import WandbLog

CONFIG = {"method": "lora", "recipe": {"batch_size": 16}}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb in a folder of its own, without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb's"))
    for name in ("PROJECT", "RUN_GROUP", "DIR", "API_KEY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    yield
    wandb.teardown()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "lora/paper/seed-0"
    folder.mkdir(parents=True)
    return folder


def begin(run: Path, said: list[str]) -> WandbLog:
    return WandbLog(run, ENDS, CONFIG, "lora/paper/seed-0", "mine/runs", said.append)


def test_what_is_logged(run: Path, said: list[str]) -> None:
    log = begin(run, said)
    log.score(score(0, 5.0))
    log.steps([step(1, 3), step(1, 4)])
    log.score(score(1, 50.0))
    log.steps([step(2, 1)])
    log.metrics({"metrics/avg_acc": 52.0, "metrics/forgetting": 6.0})
    log.close()
    [found] = wandb_files.records(run)
    rows = wandb_files.history(found)
    assert [(row["step"], row["stage"], row.get("train/loss"), row.get("strict/VQAv2")) for row in rows] == [
        (0, 0, None, 5.0),
        (3, 1, 13.0, None),
        (4, 1, 14.0, None),
        (4, 1, None, 50.0),
        (5, 2, 21.0, None),
    ]
    assert {"train/tokens", "train/learning_rate", "train/grad_norm", "train/text_loss"} <= rows[1].keys()
    assert wandb_files.summary(found).items() >= {"metrics/avg_acc": 52.0, "metrics/forgetting": 6.0}.items()
    [begun] = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.run_group, begun.job_type) == ("cnext", "mine/runs", "lora")
    assert begun.display_name == "lora/paper/seed-0"
    assert wandb_files.values(begun.config.update).items() >= CONFIG.items()
    [ended] = [record.exit for record in found if record.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0
    [line] = said
    assert line.startswith(f"wandb: offline; to upload: wandb sync {run}/wandb/offline-run-")


def test_a_resumed_run_goes_on_as_the_same_and_logs_nothing_twice(run: Path, said: list[str]) -> None:
    log = begin(run, said)
    log.score(score(0, 5.0))
    log.steps([step(1, 1), step(1, 2)])
    log.close()
    # As after an interruption: what is logged comes again, and a step that was lost with it.
    log = begin(run, said)
    log.steps([step(1, 1), step(1, 2)])
    log.score(score(0, 5.0))
    log.steps([step(1, 2), step(1, 3), step(1, 4)])
    log.score(score(1, 50.0))
    log.metrics({"metrics/avg_acc": 52.0})
    log.close()
    first, second = wandb_files.records(run)
    assert {record.run.run_id for record in (*first, *second) if record.HasField("run")} == {
        json.loads((run / "wandb.json").read_text())["id"]
    }
    rows = wandb_files.history(first) + wandb_files.history(second)
    assert [row["_step"] for row in rows] == list(range(6)), "wandb drops what does not rise"
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "strict/VQAv2" in row] == [0, 4]
    assert [record.exit.exit_code for record in (*first, *second) if record.HasField("exit")] == [1, 0]
    # A run that is finished is not begun again.
    log = begin(run, said)
    log.steps([step(1, 1)])
    log.metrics({"metrics/avg_acc": 0.0})
    log.close()
    assert len(wandb_files.records(run)) == 2


def test_the_environment_names_project_and_group(
    run: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    begin(run, said).close()
    [found] = wandb_files.records(tmp_path)
    [begun] = [record.run for record in found if record.HasField("run")]
    assert (begun.project, begun.run_group) == ("ours", "sweep")


def test_disabled_it_logs_nothing_and_keeps_nothing(
    run: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = begin(run, said)
    log.steps([step(1, 1)])
    log.metrics({"metrics/avg_acc": 0.0})
    log.close()
    assert not said
    assert not list(run.iterdir())


def test_where_it_breaks_the_run_goes_on(run: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = begin(run, said)
    log.steps([step(1, 1)])

    def lost(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost\nby its process")

    monkeypatch.setattr(log._run, "log", lost)
    log.steps([step(1, 2)])
    log.steps([step(1, 3)])
    log.metrics({"metrics/avg_acc": 0.0})
    log.close()
    [_, line] = said
    assert line.startswith("wandb failed (Connection lost): the run goes on without it, and train.jsonl")
    assert "\n" not in line
    assert not json.loads((run / "wandb.json").read_text())["finished"]


def test_without_a_login_it_asks_nothing_and_the_run_goes_on(
    run: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal too, where wandb would wait for someone to log in."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    main, terminal = pty.openpty()
    original, seen = wandb.init, []

    def init(**given: object) -> object:
        seen.append(sys.stdin.isatty())
        return original(**given)

    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(wandb, "init", init)
        log = begin(run, said)
        assert sys.stdin is stdin
    os.close(main)
    log.steps([step(1, 1)])
    log.close()
    assert seen == [False]
    [line] = said
    assert line.startswith("wandb failed (No API key configured")
    assert not list(run.iterdir()), "the same command logs all of it once there is a login"
