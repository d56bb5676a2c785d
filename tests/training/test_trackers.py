"""A run that wandb and TensorBoard log, interrupted and resumed: each step is there once."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from runs import wandb_files
from training.conftest import Make
from training.toy import rows

from cnext import run
from cnext.training.trainer import TaskTrainer


class Lost(Exception):
    """The machine is."""


def test_trackers_follow_a_run_that_is_interrupted(
    config: Make, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = config(out=tmp_path / "mine" / "runs", log=("wandb", "tensorboard"))
    with monkeypatch.context() as patch:
        original, taken = TaskTrainer.train_step, []

        def train_step(trainer: TaskTrainer) -> object:
            if len(taken) == 6:
                raise Lost
            taken.append(trainer.step)
            return original(trainer)

        patch.setattr(TaskTrainer, "train_step", train_step)
        with pytest.raises(Lost):
            run(made)
    results = run(made)
    assert (made.folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    assert list((made.folder / "tensorboard").glob("events.*"))
    first, second = wandb_files.records(made.folder)
    logged = wandb_files.history(first) + wandb_files.history(second)
    losses = [(row["stage"], row["train/loss"]) for row in logged if "train/loss" in row]
    assert losses == [(row["stage"], row["loss"]) for row in rows(made.folder / "train.jsonl")]
    assert [row["step"] for row in logged if "train/loss" in row] == list(range(1, len(losses) + 1))
    scores = [(row["stage"], name, row[name]) for row in logged for name in row if name.startswith("strict/")]
    assert scores == [(r["stage"], f"strict/{r['task']}", r["strict"]) for r in rows(made.folder / "scores.jsonl")]
    told = wandb_files.summary(second)
    for name in ("avg_acc", "forgetting", "new_acc"):
        assert told[f"metrics/{name}"] == pytest.approx(results["metrics"][name])
        assert f"metrics_paper/{name}" in told
    [begun] = [record.run for record in second if record.HasField("run")]
    assert begun.run_group == "mine/runs"
    wandb.teardown()
