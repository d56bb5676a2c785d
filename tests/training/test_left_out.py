"""A run that leaves out unusable rows: its files, its report, and that it is resumed with the same rows only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training.conftest import Make

from cnext import RunConfig, run
from cnext.cli import run_main
from cnext.errors import UserError

TEST = "VQAv2/questions/test.json"


@pytest.fixture
def skipping(config: Make, data: Path, tmp_path: Path) -> RunConfig:
    """A configuration for data of which two test rows cannot be used."""
    copy = shutil.copytree(data, tmp_path / "data")
    rows = json.loads((copy / TEST).read_text())
    del rows[0]["answer"]
    rows[3]["image"] = "gone.png"
    (copy / TEST).write_text(json.dumps(rows))
    return config(data=copy, method="zero-shot", order="VQAv2", on_bad_row="skip")


def test_what_is_left_out_is_in_the_folder_and_in_the_report(
    skipping: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    results, folder = run(skipping), skipping.folder
    assert results["samples"] == {"VQAv2": 6}
    assert "VQAv2 test: 2 rows left out: 1 malformed, 1 missing image" in capsys.readouterr().err
    found = json.loads((folder / "left_out.json").read_text())["VQAv2"]["test"]
    assert {reason: rows["count"] for reason, rows in found.items()} == {"malformed": 1, "missing image": 1}
    assert f"{skipping.data / TEST}#3: names an image that is missing" in found["missing image"]["rows"][0]
    assert json.loads((folder / "config.json").read_text())["on_bad_row"] == "skip"
    report = (folder / "report.md").read_text()
    assert "## Rows left out" in report
    assert "| VQAv2 | test | missing image | 1 |" in report
    assert "--on-bad-row skip" in report


def test_it_is_resumed_with_the_same_rows_only(skipping: RunConfig) -> None:
    run(skipping)
    before = (skipping.folder / "left_out.json").read_bytes()
    run(skipping)
    rows = json.loads((skipping.data / TEST).read_text())
    (skipping.data / TEST).write_text(json.dumps([{**row, "answer": "red"} for row in rows]))
    with pytest.raises(UserError, match=r"left out other rows of the data \(those in left_out\.json"):
        run(skipping)
    assert (skipping.folder / "left_out.json").read_bytes() == before
    (skipping.folder / "left_out.json").unlink()
    (skipping.data / TEST).write_text(json.dumps([{**row, "answer": "red"} for row in rows[:3]] + [{}]))
    with pytest.raises(UserError, match=r"left out other rows of the data \(none\)"):
        run(skipping)


def test_refused_unless_skipped(skipping: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "zero-shot", "--order", "VQAv2", "--suite", skipping.suite, "--data", str(skipping.data)]
    flags += ["--out", str(skipping.out), "--device", "cpu"]
    assert run_main(flags) == 2
    shown = capsys.readouterr().err
    assert "task VQAv2: 2 unusable rows" in shown
    assert shown.endswith("or leave them out with --on-bad-row skip\n")
    assert run_main([*flags, "--on-bad-row", "skip", "--dry-run"]) == 0
    assert "VQAv2 test: 2 rows left out: 1 malformed, 1 missing image" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown on_bad_row 'ignore'; valid: refuse, skip"):
        run(RunConfig(on_bad_row="ignore"))  # type: ignore[arg-type]
