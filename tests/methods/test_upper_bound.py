"""Upper bound: equal use of samples, one stage and one row, exact resumption, and the report."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from methods.sequence import RECIPE, TASKS, Sequence

from cnext import RunConfig, methods, report, run
from cnext.tasks import suites
from cnext.tasks.base import joined
from cnext.training import runner
from cnext.training.trainer import TaskTrainer


def config(out: Path, data: Path, suite: Path) -> RunConfig:
    values = {"suite": str(suite), "data": data, "order": ",".join(TASKS), "checkpoint_interval": 5, "device": "cpu"}
    return RunConfig(method="upper-bound", out=out, **values)


@pytest.fixture(scope="module")
def batches() -> list[list[str]]:
    """The ids of the samples of each step of the run that was never interrupted."""
    return []


@pytest.fixture(scope="module")
def finished(data: Path, toy_suite: Path, tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]) -> Path:
    made, original = config(tmp_path_factory.mktemp("joint"), data, toy_suite), TaskTrainer.train_step

    def observed(trainer: TaskTrainer) -> dict[str, Any]:
        batches.append(trainer.batches.ids(trainer.step))
        return original(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "train_step", observed)
        run(made)
    return made.folder


def test_it_is_called_a_reference() -> None:
    assert "a joint-training reference" in methods.summary("upper-bound")


@pytest.mark.parametrize("draws", [20, 96, 244], ids=lambda draws: f"{draws}-of-96")
def test_every_sample_equally_often(data: Path, draws: int) -> None:
    sequence = Sequence("upper-bound", data)
    samples = [sample for name in TASKS for sample in sequence.samples(name)]
    parameters = sequence.method.trainable(joined([suites.load("next-tiny").task(name) for name in TASKS]))
    steps = draws // RECIPE.batch_size
    trainer = TaskTrainer(sequence.tiny, sequence.method, parameters, samples, RECIPE, steps, (0, "joint"))
    counts = Counter(sample.id for sample in samples)
    for step in range(steps):
        counts.update(trainer.batches.ids(step))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert counts.total() == draws + len(samples)


def test_the_runner_trains_one_stage_on_all_tasks(finished: Path, batches: list[list[str]]) -> None:
    """12 steps of 16 over 3 x 32 samples: each one exactly twice, and tasks mixed within a batch."""
    counts = Counter(name for batch in batches for name in batch)
    assert len(counts) == 96
    assert set(counts.values()) == {2}
    assert all(len({name.partition("-")[0] for name in batch}) > 1 for batch in batches)
    logged = [json.loads(row) for row in (finished / "train.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["task"], row["step"]) for row in logged] == [(3, "joint", n) for n in range(1, 13)]


def test_only_the_last_row_and_what_follows_from_it(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["finished"]
    *empty, last = results["score_matrix"]
    assert empty == [[None] * 3] * 2
    assert all(0 <= score <= 100 for score in last)
    metrics = results["metrics"]
    assert metrics["avg_acc"] == pytest.approx(sum(last) / 3)
    assert metrics["worst_acc"] == min(last)
    unknown = ("forgetting", "new_acc", "maa", "bwt", "avg_hal", "avg_iuf", "avg_oth")
    assert [metrics[name] for name in unknown] == [None] * len(unknown)
    assert results["cost"]["optimizer_steps"] == 12


def test_interrupted_twice_it_ends_with_the_same_bits(
    finished: Path, data: Path, toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, step, evaluate = config(tmp_path, data, toy_suite), TaskTrainer.train_step, runner.evaluate

    def stopped(trainer: TaskTrainer) -> dict:
        if trainer.step == 7:
            raise KeyboardInterrupt
        return step(trainer)

    def unanswered(method: object, task: object, *rest: object) -> dict:
        if task.name == "HQEdit" and "joint" in rest:
            raise KeyboardInterrupt
        return evaluate(method, task, *rest)

    for place, name, replacement in ((TaskTrainer, "train_step", stopped), (runner, "evaluate", unanswered)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            with pytest.raises(KeyboardInterrupt):
                run(made)
    run(made)
    for name in ("results.json", "train.jsonl", "scores.jsonl"):
        assert (made.folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_report_shows_what_there_is(finished: Path) -> None:
    page, text = report.write_report(finished)
    html = page.read_text()
    assert re.findall(r"<dt>(.*?)</dt>", html) == ["Avg.ACC", "Zero-shot"]
    assert "nothing is forgotten" in html
    assert 'role="alert"' not in html
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert "Errors by type" in titles
    assert not {"Accuracy over stages", "Forgetting by error type"} & set(titles)
    rows = re.findall(r'<th scope="row">(.*?)</th>', html)
    assert {"0 zero-shot", "3 joint", "avg_acc", "worst_acc"} <= set(rows)
    assert not {"1 joint", "2 joint", "forgetting", "new_acc"} & set(rows)
    assert "nan" not in text.read_text()
