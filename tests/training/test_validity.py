"""What a run measures apart from its score matrix: the next task, held-out sets, and how separable the tasks are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training.conftest import ORDER, Make, Runs
from training.toy import change, rows

from cnext import run
from cnext.config.plan import Plan, plan
from cnext.errors import UserError
from cnext.monitoring.progress import Progress
from cnext.runs import seals
from cnext.scoring.matrix import metrics
from cnext.tasks import suites
from cnext.training import runner, separability

EXTRA = [
    (0, "Skills"), (1, "Flickr30k"), (1, "Skills"), (2, "HQEdit"), (2, "Skills"), (3, "Skills"),
]  # fmt: skip


def measured_separability(folder: Path) -> dict[str, Any]:
    return {
        key: value for key, value in json.loads((folder / "separability.json").read_text()).items() if key != "seal"
    }


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_next_task_and_held_out_sets_are_scored_at_every_stage(finished: Path) -> None:
    logged = rows(finished / "extra_scores.jsonl")
    assert [(row["stage"], row["task"]) for row in logged] == EXTRA
    for row in logged:
        answers = rows(finished / f"extra/predictions/{row['stage']}_{row['trained']}/{row['task']}.jsonl")
        assert len(answers) == row["samples"] == 8
        assert row["strict"] == pytest.approx(sum(answer["strict"] for answer in answers) / 8)
    scores = {(row["stage"], row["task"]): row for row in logged}
    for profile, found in (("strict", results(finished)), ("paper", results(finished)["profiles"]["paper"])):
        ahead = [None, *(scores[t, name][profile] for t, name in enumerate(ORDER) if t)]
        assert found["before_learnt"] == ahead
        gained = [score - base for score, base in zip(ahead[1:], found["zero_shot"][1:], strict=True)]
        assert found["metrics"]["fwt"] == pytest.approx(sum(gained) / 2)
        kept = [scores[t, "Skills"][profile] for t in range(4)]
        expected = {"tasks": ["Skills"], "samples": {"Skills": 8}, "scores": [[score] for score in kept]}
        assert found["held_out"] == expected | {"before": [kept[0]], "after": [kept[3]]}
        assert found["metrics"]["zero_shot_retention"] == pytest.approx(kept[3] - kept[0])


@pytest.mark.parametrize("method", ["lora", "prototype"])
def test_no_bit_of_the_scores_depends_on_it(
    method: str, runs: Runs, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random streams of training and answering are not moved."""
    measured = runs(method)
    monkeypatch.setattr(Plan, "extra", lambda self, stage: ())
    monkeypatch.setattr(runner.Runner, "separate_tasks", lambda self: None)
    plain = config(method=method)
    run(plain)
    for name in ("scores.jsonl", "train.jsonl"):
        assert (plain.folder / name).read_bytes() == (measured / name).read_bytes(), name
    without, found = results(plain.folder), results(measured)
    assert without["metrics"]["fwt"] is None
    assert without["before_learnt"] == [None] * 3
    for one in (found, found["profiles"]["paper"]):
        del one["held_out"], one["metrics"]["zero_shot_retention"]
        one["before_learnt"], one["metrics"]["fwt"] = [None] * 3, None
    for one in (found, without):
        # Without the held-out set it is not read.
        del one["data"], one["fingerprint"], one["seal"]
    assert found == without


@pytest.mark.parametrize("after", [1, 3, 4])
def test_stopped_while_measuring_it_ends_with_the_same_bits(
    after: int, finished: Path, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole, done = config(), runner.evaluate, []

    def stopping(method: Any, task: Any, samples: Any, scorer: Any, folder: Path, *others: Any) -> Any:
        done.extend([task.name] if folder.name == "extra" else [])
        if len(done) > after:
            raise RuntimeError("stopped")
        return whole(method, task, samples, scorer, folder, *others)

    monkeypatch.setattr(runner, "evaluate", stopping)
    with pytest.raises(RuntimeError, match="stopped"):
        run(made)
    monkeypatch.setattr(runner, "evaluate", whole)
    run(made)
    for name in ("results.json", "extra_scores.jsonl", "scores.jsonl", "separability.json"):
        assert (made.folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_run_of_an_earlier_version_is_resumed_without(finished: Path, config: Make) -> None:
    """What was not measured stays so: it is no zero, and nothing of it is done for the stages that are there."""
    made = config()
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(runner.Runner, "_evaluate_extra", lambda *_: None)
        earlier.setattr(runner.Runner, "separate_tasks", lambda self: None)
        earlier.setattr(seals, "run_name", lambda config: None)
        run(made)
    shutil.rmtree(made.folder / "checkpoints" / "3_HQEdit")
    run(made)
    found, before = results(made.folder), results(finished)
    assert found["score_matrix"] == before["score_matrix"]
    assert found["digests"] == before["digests"]
    assert found["before_learnt"] == [None] * 3
    assert found["metrics"]["fwt"] is None
    assert found["metrics"]["zero_shot_retention"] is None
    assert found["held_out"]["scores"] == [[None], [None], [None], before["held_out"]["scores"][3]]
    assert not (made.folder / "separability.json").exists()


def test_joint_and_untrained_runs_have_no_next_task(runs: Runs) -> None:
    joint, untrained = runs("upper-bound"), runs("zero-shot")
    assert [(row["stage"], row["task"]) for row in rows(joint / "extra_scores.jsonl")] == [(0, "Skills"), (3, "Skills")]
    assert [row["task"] for row in rows(untrained / "extra_scores.jsonl")] == ["Skills"] * 4
    assert {row["strict"] for row in rows(untrained / "extra_scores.jsonl")} == {
        results(untrained)["held_out"]["before"][0]
    }
    for folder in (joint, untrained):
        assert results(folder)["metrics"]["fwt"] is None
    assert results(joint)["held_out"]["scores"][1:3] == [[None], [None]]


def test_a_method_that_is_told_the_task_is_told_one_of_the_order(config: Make) -> None:
    made = config(method="mr-lora", hyperparameters={"oracle": True, "router_steps": 1})
    run(made)
    assert [(row["stage"], row["task"]) for row in rows(made.folder / "extra_scores.jsonl")] == EXTRA


def test_the_plan_counts_every_evaluation(config: Make) -> None:
    planned = plan(config())
    assert planned.evaluated == [3, 1, 2, 3]
    assert planned.evaluations == [4, 3, 4, 4]
    assert {task.name: times for task, times in planned.asked} == {
        "VQAv2": 4, "Flickr30k": 4, "HQEdit": 3, "Skills": 4
    }  # fmt: skip
    assert plan(config(method="upper-bound")).evaluations == [4, 4]
    assert plan(config(split="validation")).held_out == ["Skills"]


def test_a_held_out_set_that_the_backbone_cannot_do_is_left_out_and_named(
    config: Make, monkeypatch: pytest.MonkeyPatch, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(tiny), "modalities", classmethod(lambda cls, weights: (("text",), ("image",))))
    made = config(order="Flickr30k")
    assert plan(made).evaluations == plan(made).evaluated == [1, 1]
    run(made)
    assert "held-out set Skills is not scored" in capsys.readouterr().err
    assert "held_out" not in results(made.folder)


def test_the_progress_of_a_run_ends_with_all_evaluations_done(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(Progress, "finished", lambda self, *_: kept.append(self.eta.evaluations))
    run(config())
    assert (kept[0].done, kept[0].total) == (15, 15)


def test_separability_is_of_the_suite_and_no_method(finished: Path, runs: Runs, config: Make) -> None:
    found = measured_separability(finished)
    assert (found["tasks"], found["split"], found["centroids"]) == (list(ORDER), "test", [32] * 3)
    for seen in ("question", "image_and_question"):
        confusion = found[seen]["confusion"]
        assert [sum(row) for row in confusion] == [8] * 3
        assert found[seen]["accuracy"] == pytest.approx(100 * sum(confusion[t][t] for t in range(3)) / 24)
    assert found["question"]["accuracy"] > 90
    assert measured_separability(runs("upper-bound")) == found
    assert measured_separability(runs("zero-shot")) == found


def test_a_router_of_questions_sees_no_image(
    finished: Path, config: Make, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    """And neither sees an answer, or an image that is to be written."""
    planned = plan(config())
    from cnext.training.setup import data_folder, read_suite

    samples, asked = read_suite(planned, data_folder(planned)), []
    encode = type(tiny).encode
    monkeypatch.setattr(type(tiny), "encode", lambda self, given: asked.extend(given) or encode(self, given))
    tasks = [planned.suite.task(name) for name in ORDER]
    found = separability.separability(tiny, tasks, samples, "test")
    assert found == measured_separability(finished)
    assert all(one.target_image is None and one.turns[0].answer == one.id == "" for one in asked)
    half = len(asked) // 2
    assert all(one.image is None for one in asked[:half])
    assert sum(one.image is not None for one in asked[half:]) == 2 * (32 + 8), "Flickr30k reads none"


def test_one_task_is_not_told_apart(config: Make) -> None:
    made = config(order="VQAv2")
    run(made)
    assert not (made.folder / "separability.json").exists()
    assert results(made.folder)["before_learnt"] == [None]
    assert [row["task"] for row in rows(made.folder / "extra_scores.jsonl")] == ["Skills"] * 2


@pytest.mark.parametrize(
    ("manifest", "held_out", "message"),
    [
        ({"train": "Skills/train.json"}, ["Skills"], "Expected no files to train on, Skills is held out"),
        ({}, ["VQAv2"], "Expected held-out sets, each once and no task, got VQAv2"),
        ({}, ["Skills", "Skills"], "Expected held-out sets, each once and no task"),
        ({}, ["Absent"], "Absent.json: expected JSON"),
    ],
)
def test_a_held_out_set_that_is_none_is_refused(
    manifest: dict, held_out: list[str], message: str, toy_suite: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(toy_suite, tmp_path / "suite")
    change(folder / "suite.json", held_out=held_out)
    change(folder / "Skills.json", **manifest)
    with pytest.raises(UserError, match=message):
        suites.load(str(folder))


def test_a_suite_without_a_held_out_set_has_nothing_of_it(toy_suite: Path, config: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_suite, tmp_path / "toy")
    change(folder / "suite.json", held_out=[])
    made = config(suite=str(folder), order="VQAv2,Flickr30k")
    run(made)
    found = results(made.folder)
    assert "held_out" not in found
    assert "zero_shot_retention" not in found["metrics"]
    assert [(row["stage"], row["task"]) for row in rows(made.folder / "extra_scores.jsonl")] == [(1, "Flickr30k")]
    assert found["metrics"].keys() == metrics(runner.results.ScoreMatrix(2)).keys()
