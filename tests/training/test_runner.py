"""The main job in small: what a run leaves behind, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from waiting import until

from cnext import RunConfig, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import UserError
from cnext.runs import checkpoint
from cnext.scoring.matrix import ScoreMatrix, metrics
from cnext.training import runner

ORDER = ("VQAv2", "Flickr30k", "HQEdit")


@pytest.fixture(scope="module")
def config(data: Path, toy_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    def make(out: Path | None = None, **changes: object) -> RunConfig:
        out = out or tmp_path_factory.mktemp("runs")
        values = {"suite": str(toy_suite), "data": data, "order": ",".join(ORDER), "block_steps": 1, "device": "cpu"}
        return RunConfig(out=out, **(values | changes))

    return make


@pytest.fixture(scope="module")
def finished(config: Callable[..., RunConfig]) -> Path:
    """A run that was never interrupted."""
    made = config()
    run(made)
    return made.folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_of_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "options.json", "results.json", "cost.json", "environment.json", "scores.jsonl", "train.jsonl",
        "predictions", "checkpoints", "report.html", "report.md", "report_files", "run.log",
    }  # fmt: skip
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["1_VQAv2", "2_Flickr30k", "3_HQEdit"]


def test_score_matrix_is_the_lower_triangle_and_zero_shot(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["tasks"] == list(ORDER)
    for t, row in enumerate(results["score_matrix"]):
        assert [value is not None for value in row] == [i <= t for i in range(3)]
    assert all(0 <= value <= 100 for value in results["zero_shot"])
    assert results["finished"] is True


def test_scores_are_the_means_of_the_predictions(finished: Path) -> None:
    for row in rows(finished / "scores.jsonl"):
        answers = rows(finished / "predictions" / f"{row['stage']}_{row['trained']}" / f"{row['task']}.jsonl")
        assert len(answers) == row["samples"] == 8
        for profile in ("strict", "paper"):
            assert row[profile] == pytest.approx(sum(answer[profile] for answer in answers) / 8)
            assert sum(row["errors"][profile].values()) == pytest.approx(100 - row[profile])


def test_both_identities_hold(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for found in (results["metrics"], results["profiles"]["paper"]["metrics"]):
        assert found["forgetting"] == pytest.approx(3 / 2 * (found["new_acc"] - found["avg_acc"]))
        assert found["avg_hal"] + found["avg_iuf"] + found["avg_oth"] == pytest.approx(found["forgetting"])
    again = metrics(ScoreMatrix.from_rows(results["score_matrix"]))
    assert again["avg_acc"] == results["metrics"]["avg_acc"]


def test_every_step_is_logged_once(finished: Path) -> None:
    logged = [(row["stage"], row["task"], row["step"]) for row in rows(finished / "train.jsonl")]
    assert logged == [(t, name, step) for t, name in enumerate(ORDER, 1) for step in range(1, 5)]


def test_pictures_drawn_are_kept(finished: Path) -> None:
    drawn = [row["image"] for row in rows(finished / "predictions/2_Flickr30k/Flickr30k.jsonl") if row["image"]]
    assert drawn
    assert all((finished / path).is_file() for path in drawn)


def test_costs_count_what_was_trained(finished: Path) -> None:
    cost = json.loads((finished / "results.json").read_text())["cost"]
    assert cost["adapter_parameters"] == 312_320
    assert cost["trainable_params_by_task"] == {"VQAv2": 234_240, "Flickr30k": 156_160, "HQEdit": 234_240}
    assert cost["optimizer_steps"] == 12
    measured = json.loads((finished / "cost.json").read_text())
    assert measured["peak_memory_bytes"] > 1e8
    assert all(stage["train_seconds"] > 0 for stage in measured["stages"][1:])


def test_the_same_configuration_gives_the_same_bits(finished: Path, config: Callable[..., RunConfig]) -> None:
    again = config()
    run(again)
    for name in ("results.json", "scores.jsonl", "train.jsonl", "config.json"):
        assert (again.folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_another_seed_gives_another_run(finished: Path, config: Callable[..., RunConfig]) -> None:
    other = config(seed=1)
    run(other)
    assert (other.folder / "train.jsonl").read_bytes() != (finished / "train.jsonl").read_bytes()


def test_a_finished_run_is_not_run_again(
    finished: Path, config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("trained or answered again")

    before = (finished / "results.json").read_bytes()
    monkeypatch.setattr(TinyBackbone, "loss", forbidden)
    monkeypatch.setattr(TinyBackbone, "generate", forbidden)
    run(config(finished.parents[2]))
    assert (finished / "results.json").read_bytes() == before


def command(made: RunConfig) -> list[str]:
    """To be run in a folder without a `cnext` of its own, so that the installed one is imported."""
    flags = {
        "--suite": made.suite, "--data": made.data, "--order": made.order, "--out": made.out, "--device": "cpu",
        "--block-steps": made.block_steps,
    }  # fmt: skip
    return [sys.executable, "-m", "cnext", "run", *(str(part) for pair in flags.items() for part in pair)]


def test_killed_anywhere_it_ends_with_the_same_bits(finished: Path, config: Callable[..., RunConfig]) -> None:
    """SIGKILL while loading, answering zero-shot, inside a task, and while evaluating; then the command once more."""
    made = config()
    moments = (
        "config.json",
        "predictions/0_zero-shot/VQAv2.jsonl",
        "checkpoints/1_VQAv2_step2/manifest.json",
        "predictions/2_Flickr30k/VQAv2.jsonl",
        "checkpoints/3_HQEdit_step1/adapters.safetensors",
    )
    for moment in moments:
        process = subprocess.Popen(command(made), cwd=made.out, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until(lambda m=moment, p=process: (made.folder / m).exists() or p.poll() is not None, [process.pid])
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"at {moment}: {errors.decode()}"
    subprocess.run(command(made), cwd=made.out, check=True, capture_output=True)
    for name in ("results.json", "train.jsonl"):
        assert (made.folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_folder_of_another_configuration_is_refused(finished: Path, config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError) as error:
        run(config(finished.parents[2], learning_rate=0.5, hyperparameters={"c": 2.0}))
    assert "recipe.learning_rate: 0.001 there, 0.5 requested" in str(error.value)
    assert "hyperparameters.c: 5.0 there, 2.0 requested" in str(error.value)


def test_a_mistake_before_the_first_result_can_be_mended(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The corrected command runs in the same folder; only results are worth refusing for."""
    made = config(order="VQAv2", data=tmp_path)
    with pytest.raises(UserError, match="VQAv2"):
        run(made)
    assert (made.folder / "config.json").is_file()
    assert run(config(made.out, order="VQAv2"))["finished"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "csv", "unknown format of task VQAv2 'csv'; valid: conversation, generation, editing"),
        ("scorer", "bleu", "unknown scorer of task VQAv2 'bleu'; valid: short_answer, ocr_answer"),
        ("reads", ["audio"], "unknown modality audio; valid: text, image"),
    ],
    ids=["format", "scorer", "modality"],
)
def test_a_manifest_that_names_what_is_not_there(
    key: str, value: object, message: str, toy_suite: Path, tmp_path: Path, config: Callable[..., RunConfig]
) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(toy_suite, folder)
    manifest = json.loads((folder / "VQAv2.json").read_text())
    (folder / "VQAv2.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(UserError, match=message):
        run(config(suite=str(folder)))


def test_two_processes_in_one_folder_are_refused(config: Callable[..., RunConfig]) -> None:
    made = config()
    planned = runner.plan(made)
    first = runner.RunFolder(made.folder, planned.as_dict())
    with pytest.raises(UserError, match="another process is running"):
        runner.RunFolder(made.folder, planned.as_dict())
    first.close()
    runner.RunFolder(made.folder, planned.as_dict()).close()


def test_a_damaged_checkpoint_is_named_and_not_read(config: Callable[..., RunConfig]) -> None:
    made = config(order="VQAv2")
    run(made)
    path = made.folder / "checkpoints" / "1_VQAv2" / "adapters.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no checkpoint of this run is intact:\n.*adapters\.safetensors has changed"):
        run(made)


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original, calls = config(order="VQAv2"), TinyBackbone.loss, []

    def poisoned(self: TinyBackbone, encoded: object, whole: object = None) -> object:
        calls.append(1)
        loss = original(self, encoded, whole)
        return loss if len(calls) < 3 else type(loss)(loss.total * torch.nan, loss.text, loss.image, loss.tokens)

    monkeypatch.setattr(TinyBackbone, "loss", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan at step 3 of 4; samples of the batch: VQAv2-train-0000"):
        run(made)
    label = made.folder / "checkpoints" / "1_VQAv2_step2"
    tensors, values = checkpoint.load(label)
    assert values["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in tensors["adapters"].values())
    monkeypatch.undo()
    assert run(made)["finished"]


def test_zero_shot_scores_stay(config: Callable[..., RunConfig]) -> None:
    results = run(config(method="zero-shot"))
    assert results["metrics"]["forgetting"] == 0
    assert results["score_matrix"][-1] == results["zero_shot"]
    assert results["cost"]["trainable_params"] == 0


def test_data_is_checked_before_anything_is_trained(
    config: Callable[..., RunConfig], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad row of the last task's test file stops the run before the first step, and names file and row."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    path = copy / "HQEdit/questions/test.json"
    broken = json.loads(path.read_text())
    del broken[3]["instruction"]
    path.write_text(json.dumps(broken))
    monkeypatch.setattr(TinyBackbone, "generate", lambda *_: pytest.fail("the run has started"))
    with pytest.raises(UserError, match=r"test\.json#3: lacks the key 'instruction'"):
        run(config(data=copy))


def test_validation_items_are_not_test_items(config: Callable[..., RunConfig]) -> None:
    made = config(split="validation", order="VQAv2")
    run(made)
    answers = rows(made.folder / "predictions/1_VQAv2/VQAv2.jsonl")
    assert all(row["id"].startswith("VQAv2-validation-") for row in answers)
