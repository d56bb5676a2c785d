"""A run from end to end: its files, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.conftest import ORDER, Make
from training.faults import damage
from training.toy import change, copy_suite, rows
from waiting import until

from cnext import RunConfig, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.monitoring.progress import Progress
from cnext.monitoring.signals import Stop
from cnext.runs import checkpoint
from cnext.runs.state_digests import StateDigest
from cnext.scoring.base import Prediction
from cnext.training import runner
from cnext.training.cost import StageCost
from cnext.training.state import RunState, Trained


def test_files_of_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "options.json", "run.yaml", "results.json", "cost.json", "environment.json", "data.json",
        "scores.jsonl", "train.jsonl", "separability.json", "extra_scores.jsonl", "extra", "predictions", "checkpoints",
        "report.html", "report.md", "report_files", "run.log",
    }  # fmt: skip
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["1_VQAv2", "2_Flickr30k", "3_HQEdit"]
    generated = [row["image"] for row in rows(finished / "predictions/2_Flickr30k/Flickr30k.jsonl") if row["image"]]
    assert generated
    assert all((finished / path).is_file() for path in generated)


def test_results_of_a_run(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["tasks"] == list(ORDER)
    assert results["finished"] is True
    assert all(0 <= value <= 100 for value in results["zero_shot"])
    for t, row in enumerate(results["score_matrix"]):
        assert [value is not None for value in row] == [i <= t for i in range(3)]
    for found in (results["metrics"], results["profiles"]["paper"]["metrics"]):
        assert found["forgetting"] == pytest.approx(3 / 2 * (found["new_acc"] - found["avg_acc"]))
        assert found["avg_hal"] + found["avg_iuf"] + found["avg_oth"] == pytest.approx(found["forgetting"])
    last = results["score_matrix"][-1]
    assert results["metrics"]["avg_acc"] == pytest.approx(sum(last) / 3)


def test_scores_are_the_means_of_the_predictions(finished: Path) -> None:
    for row in rows(finished / "scores.jsonl"):
        answers = rows(finished / "predictions" / f"{row['stage']}_{row['trained']}" / f"{row['task']}.jsonl")
        assert len(answers) == row["samples"] == 8
        for profile in ("strict", "paper"):
            assert row[profile] == pytest.approx(sum(answer[profile] for answer in answers) / 8)
            assert sum(row["errors"][profile].values()) == pytest.approx(100 - row[profile])


def test_what_the_papers_evaluators_see_is_kept(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is another text than the answer."""
    given = [Prediction("x < 3", None, "x"), *[Prediction("red")] * 7]
    monkeypatch.setattr(TinyBackbone, "generate", lambda self, samples, most: given[: len(samples)])
    made = config(method="zero-shot", order="VQAv2")
    run(made)
    first, *others = rows(made.folder / "predictions/0_zero-shot/VQAv2.jsonl")
    assert (first["text"], first["released_text"]) == ("x < 3", "x")
    assert all(row["text"] == "red" and "released_text" not in row for row in others)


def test_every_step_is_logged_once(finished: Path) -> None:
    logged = [(row["stage"], row["task"], row["step"]) for row in rows(finished / "train.jsonl")]
    assert logged == [(t, name, step) for t, name in enumerate(ORDER, 1) for step in range(1, 5)]


def test_costs_count_what_was_trained(finished: Path) -> None:
    cost = json.loads((finished / "results.json").read_text())["cost"]
    assert cost["adapter_parameters"] == 312_320
    assert cost["trainable_params_by_task"] == dict.fromkeys(("VQAv2", "Flickr30k", "HQEdit"), 169_984)
    assert cost["optimizer_steps"] == 12


def test_the_seed_decides_every_bit(finished: Path, config: Make) -> None:
    again, other = config(checkpoint_interval=3), config(seed=1)
    run(again)
    run(other)
    for name in ("results.json", "scores.jsonl", "train.jsonl"):
        assert (again.folder / name).read_bytes() == (finished / name).read_bytes(), name
        assert (other.folder / name).read_bytes() != (finished / name).read_bytes(), name


def test_a_finished_run_is_not_run_again(finished: Path, config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (finished / "results.json").read_bytes()
    for name in ("loss", "generate"):
        monkeypatch.setattr(TinyBackbone, name, lambda *_: pytest.fail("trained or answered again"))
    run(config(out=finished.parents[2]))
    assert (finished / "results.json").read_bytes() == before


def command(made: RunConfig) -> list[str]:
    """To be run in a folder without a `cnext` of its own, so that the installed one is imported."""
    flags = {
        "--suite": made.suite, "--data": made.data, "--order": made.order, "--out": made.out, "--device": "cpu",
        "--checkpoint-interval": made.checkpoint_interval,
    }  # fmt: skip
    return [sys.executable, "-m", "cnext", "run", *(str(part) for pair in flags.items() for part in pair)]


def test_killed_anywhere_it_ends_with_the_same_bits(finished: Path, config: Make) -> None:
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


def test_a_state_is_restored_from_its_manifest(tmp_path: Path) -> None:
    """Through a checkpoint's file. Scores and fingerprints are in files of their own."""
    state = RunState(
        tasks_done=1, step=3, trained={"a": Trained(5, 4, 10)}, averaging=[None],
        measured={"a": StageCost(1.5, 0.5, None, 7, None)}, stored_by_stage={"a": 9}, stored_bytes=9,
        digests=[StateDigest(0, "zero-shot", "0")],
    )  # fmt: skip
    state.add_averaging("a", {"text-general": {"mean": 0.5, "std": 0.25}})
    checkpoint.save(tmp_path / "1_a", {}, state.to_manifest())
    _, values = checkpoint.load(tmp_path / "1_a")
    assert RunState.from_manifest(values, tmp_path) == state
    values["ledger"]["trained"] = {"a": 5}
    with pytest.raises(UserError, match=r"Expected `object`, got `int` - at `\$.trained\[...\]`"):
        RunState.from_manifest(values, tmp_path)


def test_a_runner_is_made_without_loading(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "prepare", lambda *_: pytest.fail("loaded"))
    joint = config(method="upper-bound")
    for made, stages in ((config(), [(1, 4), (2, 4), (3, 4)]), (joint, [(3, 12)])):
        found = runner.Runner(plan(made), None, Progress(quiet=True), Stop())
        assert [(stage.number, stage.steps) for stage in found.stages] == stages
        assert found.state == RunState()


def test_a_folder_of_another_configuration_is_refused(finished: Path, config: Make) -> None:
    with pytest.raises(UserError) as error:
        run(config(out=finished.parents[2], learning_rate=0.5, hyperparameters={"c": 2.0}))
    assert "recipe.learning_rate: 0.001 there, 0.5 requested" in str(error.value)
    assert "hyperparameters.c: 5.0 there, 2.0 requested" in str(error.value)


def test_an_error_before_the_first_result_can_be_fixed(config: Make, tmp_path: Path) -> None:
    """The corrected command runs in the same folder; only results are worth refusing for."""
    made = config(order="VQAv2", data=tmp_path)
    with pytest.raises(UserError, match="VQAv2"):
        run(made)
    assert (made.folder / "config.json").is_file()
    assert run(config(out=made.out, order="VQAv2"))["finished"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "csv", "unknown format of task VQAv2 'csv'; valid: conversation, generation, editing"),
        ("scorer", "bleu", "unknown scorer of task VQAv2 'bleu'; valid: short_answer, ocr_answer"),
        ("reads", ["audio"], "unknown modality 'audio'; valid: text, image"),
    ],
    ids=["format", "scorer", "modality"],
)
def test_a_manifest_with_an_unknown_name_is_refused(
    key: str, value: object, message: str, toy_suite: Path, tmp_path: Path, config: Make
) -> None:
    folder = shutil.copytree(toy_suite, tmp_path / "suite")
    change(folder / "VQAv2.json", **{key: value})
    with pytest.raises(UserError, match=message):
        plan(config(suite=str(folder)))


def test_a_run_without_a_good_checkpoint_is_refused(config: Make) -> None:
    made = config(order="VQAv2")
    run(made)
    damage(made.folder / "checkpoints" / "1_VQAv2" / "adapters.safetensors", 1.0, cut=False)
    with pytest.raises(UserError, match=r"no checkpoint of this run is intact:\n.*adapters\.safetensors has changed"):
        run(made)


def test_a_loss_that_is_not_finite_stops_the_run(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original, calls = config(order="VQAv2"), TinyBackbone.loss, []

    def poisoned(self: TinyBackbone, encoded: object, whole: object = None) -> object:
        calls.append(1)
        loss = original(self, encoded, whole)
        return loss if len(calls) < 3 else dataclasses.replace(loss, total=loss.total * torch.nan)

    monkeypatch.setattr(TinyBackbone, "loss", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan at step 3 of 4; samples of the batch: VQAv2-train-0000"):
        run(made)
    tensors, values = checkpoint.load(made.folder / "checkpoints" / "1_VQAv2_step2")
    assert values["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in tensors["adapters"].values())
    monkeypatch.undo()
    assert run(made)["finished"]


def test_zero_shot_scores_stay(config: Make) -> None:
    results = run(config(method="zero-shot"))
    assert results["metrics"]["forgetting"] == 0
    assert results["score_matrix"][-1] == results["zero_shot"]
    assert results["cost"]["trainable_params"] == 0


def test_another_scorer_in_the_middle_of_a_run_is_warned_of(config: Make, toy_suite: Path, tmp_path: Path) -> None:
    """A suite whose tasks have other scorers than when the run began, as after an update."""
    suite = copy_suite(toy_suite, tmp_path / "suite")
    made = config(suite=str(suite), order="VQAv2,OCRVQA", method="zero-shot")
    for scorer, warned in (("short_answer", False), ("exact_answer", True)):
        change(suite / "VQAv2.json", scorer=scorer)
        run(made)
        log = (made.folder / "run.log").read_text()
        assert ("warning: VQAv2 was scored by short_answer and is by exact_answer from here" in log) == warned
    assert "OCRVQA was scored" not in log


def test_data_is_checked_before_anything_is_trained(
    config: Make, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad row of the last task's test file stops the run before the first step, and names file and row."""
    copy = shutil.copytree(data, tmp_path / "data")
    path = copy / "HQEdit/questions/test.json"
    broken = json.loads(path.read_text())
    del broken[3]["instruction"]
    path.write_text(json.dumps(broken))
    monkeypatch.setattr(TinyBackbone, "generate", lambda *_: pytest.fail("the run has started"))
    with pytest.raises(UserError, match=r"test\.json#3: lacks the key 'instruction'"):
        run(config(data=copy))


def test_validation_items_are_not_test_items(config: Make) -> None:
    made = config(split="validation", order="VQAv2")
    run(made)
    answers = rows(made.folder / "predictions/1_VQAv2/VQAv2.jsonl")
    assert all(row["id"].startswith("VQAv2-validation-") for row in answers)
