"""``cnext evaluate``: the scores of a checkpoint or an adapter are those of its run, and nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training.conftest import ORDER, Runs
from training.toy import rows

from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import main
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.exchange.evaluation import configuration, evaluate, trainable_for
from cnext.exchange.export import export
from cnext.exchange.importing import import_adapter
from cnext.training.trainer import TaskTrainer

SECOND = "2_Flickr30k"
SHORTER = {"router_steps": 2, "samples": 4}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of its own, for the default output folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toy(toy_suite: Path, data: Path) -> dict:
    return {"suite": str(toy_suite), "data": data, "device": "cpu"}


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskTrainer, "train_step", lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize("method", ["mage", "mage-experts", "mr-lora"])
def test_a_checkpoint_has_the_scores_of_its_run(
    method: str, runs: Runs, toy: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its branches are for each task of the run: the run's tasks are known."""
    before = runs(method, hyperparameters=SHORTER if method == "mr-lora" else {})
    untrained(monkeypatch)
    found = evaluate(before / "checkpoints" / SECOND, **toy)
    expected = json.loads((before / "results.json").read_text())
    assert found["tasks"] == list(ORDER[:2])
    assert found["score_matrix"] == [[None] * 2, expected["score_matrix"][1][:2]]
    assert found["zero_shot"] == [None, None]
    assert found["digests"][-1]["sha256"] == expected["digests"][2]["sha256"]
    assert found["finished"] is True
    assert {name for name, value in found["metrics"].items() if value is not None} == {
        "avg_acc", "avg_acc_text", "avg_acc_image", "worst_acc",
    }  # fmt: skip
    [folder] = Path("evaluations").glob(f"{SECOND}-*/{method}/*/seed-0")
    for task in ORDER[:2]:
        answers = [rows(run / "predictions" / SECOND / f"{task}.jsonl") for run in (folder, before)]
        assert [row["text"] for row in answers[0]] == [row["text"] for row in answers[1]]
    assert sorted(path.name for path in (folder / "predictions").iterdir()) == [SECOND], "no zero-shot"


FILES = {
    "mage, authors": ("mage", "authors", "released", {}, 1e-4),
    "mage-paper of scale 4, authors": ("mage-paper", "authors", "released", {"scale": 4.0}, 0.0),
    "lora of scale 4, authors": ("lora", "authors", "connections", {"scale": 4.0}, 0.0),
    "moelora of scale 2, authors": ("moelora", "authors", "branches", {"scale": 2.0}, 0.0),
    "mage, PEFT of half the scale": ("mage", "peft", "branches", {"scale": 0.5}, 0.0),
    "lora of another rank, PEFT": ("lora", "peft", "branches", {"rank": 4, "scale": 6.0}, 0.0),
}
"""Last, the relative difference of scores: the authors' files have the scale in B; a power of two does not round it."""


@pytest.mark.parametrize(("method", "format", "trainable", "hyperparameters", "rel"), FILES.values(), ids=FILES)
def test_an_adapter_has_the_scores_of_its_run(
    method: str,
    format: str,
    trainable: str,
    hyperparameters: dict,
    rel: float,
    runs: Runs,
    toy_suite: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the command alone: rank, scale and what was trained besides the branches are in the file."""
    options = {"hyperparameters": hyperparameters, "trainable": trainable, "order": ",".join(ORDER[:2])}
    before = runs(method, **options)
    export(before, Path("out"), format)
    untrained(monkeypatch)
    capsys.readouterr()
    told = ["--method", method] if format == "authors" and method != "lora" else []
    flags = ["--suite", str(toy_suite), "--data", str(data), "--device", "cpu", "--tasks", ",".join(ORDER[:2])]
    assert main(["evaluate", "out", *told, *flags]) == 0
    shown = capsys.readouterr()
    assert "after 2 Flickr30k: VQAv2 " in shown.err
    assert "Avg.ACC " in shown.out
    [folder] = Path("evaluations").glob(f"*/{method}/VQAv2-Flickr30k/seed-0")
    found, expected = (json.loads((run / "results.json").read_text()) for run in (folder, before))
    assert found["score_matrix"][1] == pytest.approx(expected["score_matrix"][1], rel=rel, abs=0)
    assert main(["compare", str(folder), "--to", str(before)]) == 0
    assert "2 " in capsys.readouterr().out
    assert main(["judge", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    name = "pytorch_model.bin" if format == "authors" else "out"
    assert f"Evaluation of {name}, without training." in text
    assert "a lower bound" not in text


def test_tasks_of_the_suite_or_of_the_run(runs: Runs, toy: dict) -> None:
    export(runs("lora"), Path("out"), "peft")
    made = configuration(Path("out"), **toy)
    assert made.order == "paper"
    assert made.init_tasks == ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")
    found = evaluate(runs("mr-lora", hyperparameters=SHORTER), tasks="RefCOCO", **toy)
    assert found["score_matrix"][0][0] is not None
    assert configuration(runs("lora"), **toy).order == ",".join(ORDER)
    oracle = runs("mr-lora", hyperparameters=SHORTER | {"oracle": True})
    with pytest.raises(UserError, match="mr-lora is told the task at test, and has not learnt RefCOCO"):
        evaluate(oracle, tasks="RefCOCO", **toy)


def test_an_imported_adapter_with_connections(runs: Runs, toy: dict) -> None:
    options = {"hyperparameters": {}, "trainable": "connections", "order": ",".join(ORDER[:2])}
    before = runs("lora", **options)
    export(before, Path("out"), "authors")
    import_adapter(Path("out"), Path("imported"), method="lora")
    found = evaluate(Path("imported"), tasks=",".join(ORDER[:2]), **toy)
    assert found["score_matrix"][1] == json.loads((before / "results.json").read_text())["score_matrix"][1]


def test_what_is_scored_is_not_scored_again(runs: Runs, toy: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs("lora")
    original, calls = TinyBackbone.generate, []

    def failing(self: TinyBackbone, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(TinyBackbone, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, **toy)
    found = evaluate(first, **toy)
    assert len(calls) == 1 + len(ORDER)
    assert evaluate(first, **toy) == found
    assert len(calls) == 1 + len(ORDER)


REFUSED = {
    "method of a file": (
        ["--method", "ewc"],
        "unknown method of an adapter 'ewc'; valid: mage, mage-paper, moelora, l",
    ),
    "several branches": ([], "has several branches; give --method mage or --method moelora"),
    "tasks": (["--method", "mage", "--tasks", "VQA"], "unknown"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    flags: list[str], message: str, runs: Runs, toy: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    export(runs("mage"), Path("out"), "authors")
    given = ["--suite", toy["suite"], "--data", str(toy["data"])]
    assert main(["evaluate", "out", *given, *flags]) == 2
    assert message in capsys.readouterr().err
    assert main(["evaluate", str(runs("mage")), *given, "--method", "lora"]) == 2
    assert "is of mage, got --method lora; leave it out" in capsys.readouterr().err
    assert not Path("evaluations").exists()


def test_what_is_trained_besides_the_branches_is_the_least_that_has_it() -> None:
    assert trainable_for([]) == "branches"
    assert trainable_for(["input_resampler"]) == "connections"
    assert trainable_for(["input_resampler", "norms"]) == "released"


def test_in_float16_nothing_is_trained(runs: Runs, toy: dict) -> None:
    before = runs("lora")
    found = evaluate(before, **toy, precision="float16")
    expected = json.loads((before / "results.json").read_text())
    assert found["score_matrix"][-1] == pytest.approx(expected["score_matrix"][-1], abs=15)
    [folder] = Path("evaluations").glob("*/lora/*/seed-0")
    assert json.loads((folder / "config.json").read_text())["recipe"]["precision"] == "float16"
    plan(RunConfig(**toy, method="zero-shot", precision="float16"))
    with pytest.raises(UserError, match="float16 is for evaluation"):
        plan(RunConfig(**toy, method="lora", precision="float16"))
