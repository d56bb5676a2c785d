"""TensorBoard event files hold what the logs hold, each step once, however often a run was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cnext import packages
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.runs.run_folder import RunFolder
from cnext.runs.schemas import StageScore, TrainStep
from cnext.runs.trackers.base import TRAINING
from cnext.runs.trackers.tensorboard import EventLog
from cnext.scoring.base import ERROR_TYPES, PROFILES

ENDS = {0: 0, 1: 4, 2: 7}


def step(stage: int, number: int) -> TrainStep:
    return TrainStep(stage=stage, task="t", step=number, **dict.fromkeys(TRAINING, 10 * stage + number))


def score(stage: int, strict: float) -> StageScore:
    errors = dict.fromkeys(PROFILES, dict.fromkeys(ERROR_TYPES, 0.0))
    return StageScore(stage, "t", "VQAv2", "text", 2, strict, paper=1.0, errors=errors)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_steps_count_over_the_whole_run(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "tensorboard", ENDS, {"seed": 3, "recipe": {"betas": [0.9, 0.98]}, "data": None})
    log.score(score(0, 5.0))
    log.steps([step(1, 3), step(1, 4)])
    log.score(score(1, 50.0))
    log.steps([step(2, 1)])
    log.metrics({"metrics/avg_acc": 50.0})
    log.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(3, 13.0), (4, 14.0), (5, 21.0)]
    assert found["strict/VQAv2"] == [(0, 5.0), (4, 50.0)]
    assert found["metrics/avg_acc"] == [(7, 50.0)]
    assert {f"train/{name}" for name in TRAINING} | {"strict/VQAv2", "paper/VQAv2", "metrics/avg_acc"} == set(found)


def test_the_configuration_is_shown_beside_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    log = EventLog(tmp_path, ENDS, {"seed": 3, "recipe": {"betas": [0.9, 0.98], "schedule": "cosine"}, "data": None})
    log.metrics({"metrics/avg_acc": 50.0})
    log.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    start = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = {
        name: value.string_value or value.number_value
        for name, value in parse_session_start_info_plugin_data(start).hparams.items()
    }
    assert shown == {"seed": 3, "recipe.betas": "0.9, 0.98", "recipe.schedule": "cosine"}


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    config = {"method": "lora"}
    for interrupted in (True, False):
        folder = RunFolder(tmp_path, config)
        folder.cut(1, (1, 2), lambda line: None)
        folder.mirror([EventLog(tmp_path / "tensorboard", ENDS, config)])
        if interrupted:
            folder.log_score(score(0, 5.0))
            folder.log_steps([step(1, 1), step(1, 2)])
            folder.log_steps([step(1, 3)])
        else:
            folder.log_steps([step(1, 3), step(1, 4)])
            folder.log_score(score(1, 50.0))
        folder.close()
    found = scalars(tmp_path / "tensorboard")
    assert [number for number, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert found["strict/VQAv2"] == [(0, 5.0), (4, 50.0)]
    logged = [json.loads(line)["step"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4], "train.jsonl is written with or without TensorBoard"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package_no_run_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", {"tensorboard": "1", "wandb": "1", name: None}.get)
    with pytest.raises(UserError, match=rf"needs the package {name}; pip install 'cnext\[{name}\]'"):
        plan(RunConfig(log=("tensorboard", "wandb")))
    assert plan(RunConfig())


def test_how_a_run_is_logged_is_not_part_of_what_it_is() -> None:
    for log in ("tensorboard", ("tensorboard", "wandb"), ["wandb"], "jsonl", ()):
        assert plan(RunConfig(log=log)).as_dict() == plan(RunConfig()).as_dict()
    assert RunConfig(log=("wandb", "jsonl", "wandb")).trackers == ("wandb",)
    with pytest.raises(UserError, match="unknown log 'mlflow'; valid: jsonl, tensorboard, wandb"):
        plan(RunConfig(log=("mlflow",)))
