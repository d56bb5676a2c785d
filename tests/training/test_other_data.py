"""Runs on other data: not resumed, and neither averaged nor compared unless asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sealing
from training.conftest import Make
from training.test_repeatability import copy, results

from cnext import RunConfig, run
from cnext.cli import main
from cnext.errors import UserError
from cnext.runs import checkpoint, data_alike, data_file
from cnext.runs.schemas import DataSummary

OTHER = {"sha256": "0" * 64, "rows": 8}


@pytest.fixture
def again(finished: Path, config: Make, data: Path, tmp_path: Path) -> RunConfig:
    """The finished run in another folder, without its last checkpoint, on the same data in another folder."""
    made = config(data=shutil.copytree(data, tmp_path / "data"))
    made.folder.parent.mkdir(parents=True)
    shutil.copytree(finished, made.folder)
    shutil.rmtree(made.folder / "checkpoints" / "3_HQEdit")
    sealing.change(made.folder / "config.json", data=str(made.data))
    return made


def test_a_run_is_not_resumed_on_other_data(again: RunConfig, finished: Path) -> None:
    """But on the same, in whatever folder."""
    file = again.data / "VQAv2/questions/test.json"
    rows = file.read_text()
    changed = [{**row, "answer": "zebra"} if index > 4 else row for index, row in enumerate(json.loads(rows))]
    file.write_text(json.dumps(changed))
    there = sorted(again.folder.rglob("*"))
    with pytest.raises(UserError) as refused:
        run(again)
    assert "\n  task VQAv2, test: first row that differs: row 6, " in str(refused.value)
    assert f"{file}#5 (id VQAv2-test-00005)" in str(refused.value)
    assert sorted(again.folder.rglob("*")) == there
    file.write_text(rows)
    assert run(again)["data"] == results(finished)["data"]
    assert results(again.folder) == results(finished)


def test_a_checkpoint_of_other_data_is_refused(again: RunConfig) -> None:
    folder = again.folder / "checkpoints" / "2_Flickr30k"
    tensors, values = checkpoint.load(folder)
    checkpoint.save(folder, tensors, values | {"data_sha256": "0" * 64})
    with pytest.raises(UserError, match="the checkpoint is of a run on other data"):
        run(again)


def test_digests_are_in_config_results_and_fingerprint(finished: Path) -> None:
    found = results(finished)
    rows = {task: {split: one["rows"] for split, one in splits.items()} for task, splits in found["data"].items()}
    assert rows == {**{task: {"train": 32, "test": 8} for task in found["tasks"]}, "Skills": {"test": 8}}
    joint = json.loads((finished / "config.json").read_text())["data_sha256"]
    assert found["fingerprint"]["data"] == joint
    _, values = checkpoint.load(finished / "checkpoints" / "3_HQEdit")
    assert values["data_sha256"] == joint
    assert [*json.loads((finished / data_file.FILE).read_text())["rows"]] == [*found["data"]]


def test_runs_on_other_data_are_not_averaged(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(finished)
    other = found["data"] | {"HQEdit": found["data"]["HQEdit"] | {"test": OTHER}}
    fingerprint = found["fingerprint"] | {"data": "0" * 64}
    folders = [copy(finished, tmp_path / "seed-0", seed=0)]
    folders += [copy(finished, tmp_path / "seed-1", seed=1, data=other, fingerprint=fingerprint)]
    for verb in (["table"], ["table", "--columns", "avg_acc"], ["analyze", "--what", "seeds"], ["report"], ["plot"]):
        given = [*verb[:1], str(tmp_path), *verb[1:], *(["--to", str(tmp_path / "plots")] if verb == ["plot"] else [])]
        assert main(given) == 2
        shown = capsys.readouterr().err
        assert "were run on different data" in shown
        assert "\n  data of HQEdit, test: 8 rows of SHA-256 " in shown
        assert "--mix-data averages them" in shown
    assert main(["table", str(tmp_path), "--mix-data"]) == 0
    assert "Averaged over runs on 2 different sets of data. data of HQEdit, test: " in capsys.readouterr().out
    assert main(["compare", str(folders[0]), "--to", str(folders[1])]) == 2
    assert "  data of HQEdit, test: 8 rows of SHA-256 " in capsys.readouterr().err
    assert main(["compare", str(folders[0]), "--to", str(folders[1]), "--anyway"]) == 0


def test_older_results_are_read_and_noted(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = {name: value for name, value in results(finished)["fingerprint"].items() if name != "data"}
    for seed in (0, 1):
        copy(finished, tmp_path / f"seed-{seed}", seed=seed, data=None, fingerprint=older)
    copy(finished, tmp_path / "seed-2", seed=2)
    assert main(["table", str(tmp_path)]) == 0
    assert "2 of 3 runs have no digest of their data (results of an earlier version)" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "seed-0"), "--to", str(tmp_path / "seed-2")]) == 0
    assert "data of" not in capsys.readouterr().out


def test_every_known_digest_counts() -> None:
    """Also where the first run has none, and where one lacks a task."""
    known = {"A": {"test": DataSummary("ab", 2)}}
    assert data_alike.check_alike({"one": None, "two": known, "three": known, "four": None}) == []
    for other in ({"A": {"test": DataSummary("cd", 2)}}, {}, known | {"B": {"test": DataSummary("ab", 2)}}):
        with pytest.raises(UserError, match="two and four were run on different data"):
            data_alike.check_alike({"one": None, "two": known, "three": known, "four": other})
        (note,) = data_alike.check_alike({"one": None, "two": known, "four": other}, mix=True)
        assert note.startswith("Averaged over runs on 2 different sets of data. data of ")
