"""Output where the terminal has ASCII only, and names of files that are no UTF-8."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from report.fake_run import write_fake_run

from cnext import RunConfig
from cnext.cli import main, run_main
from cnext.errors import UserError
from cnext.runs.checkpoint import write_text

NO_UTF8 = "bad\udcff"
"""What Python makes of the file name b"bad\\xff"."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encodings")
    for method in ("lora", "mage"):
        for seed in (0, 1):
            run = out / method / "paper" / f"seed-{seed}"
            write_fake_run(run, ("VQAv2", "OCRVQA"), samples=4, method=method, seed=seed)
    return out


@pytest.mark.parametrize(
    ("words", "escaped"),
    [
        (["--help"], ""),
        (["run", "--help"], ""),
        (["run", "--help-all"], ""),
        (["run", "--method", "none"], ""),
        (["list"], ""),
        (["card", "mage"], ""),
        (["table", "RUNS"], "\\xb1"),
        (["table", "RUNS", "--format", "csv"], ""),
        (["table", "RUNS", "--columns", "avg_acc"], "\\xb1"),
        (["analyze", "RUNS"], "\\xb1"),
        (["status", "RUNS"], ""),
        (["status", "RUNS/bÿ"], "b\\xff"),
        (["compare", "RUNS/mage/paper/seed-0", "--to", "RUNS/lora/paper/seed-0", "--anyway"], ""),
        (["judge", "RUNS/mage/paper/seed-0", "--dry-run"], ""),
        (["judge", "RUNS/mage/paper/seed-0"], ""),
        (["export", "RUNS/mage/paper/seed-0", "--to", "RUNS/ÿ", "--format", "peft"], ""),
    ],
    ids=lambda value: " ".join(value).replace("RUNS/", "") if isinstance(value, list) else "",
)
def test_what_ascii_lacks_is_escaped(
    words: list[str], escaped: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in shown.items():
        monkeypatch.setattr(sys, name, stream)
    with contextlib.suppress(SystemExit):
        main([word.replace("RUNS", str(runs)) for word in words])
    monkeypatch.undo()
    text = ""
    for stream in shown.values():
        stream.flush()
        text += stream.buffer.getvalue().decode("ascii")  # pyright: ignore[reportAttributeAccessIssue]
    assert text
    assert escaped in text


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--out", NO_UTF8],
        ["run", "--data", NO_UTF8],
        ["run", f"--weights={NO_UTF8}"],
        ["table", NO_UTF8],
        ["status", NO_UTF8],
        ["judge", NO_UTF8],
        ["export", "run", "--to", NO_UTF8, "--format", "peft"],
        ["doctor", "--out", NO_UTF8],
    ],
    ids=lambda words: words[0] + words[1].partition("=")[0].replace(NO_UTF8, ""),
)
def test_a_name_that_is_no_utf8_is_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: expected text in ")
    assert "bad\\udcff; " in said.err
    assert said.err.count("\n") == 1
    if words[0] == "run":
        assert run_main(words[1:]) == 2


@pytest.mark.parametrize("value", [NO_UTF8, "a\0b"], ids=["bytes", "zero"])
@pytest.mark.parametrize("name", ["out", "data", "weights", "suite", "backbone", "order", "init_tasks"])
def test_so_it_is_in_python(name: str, value: str) -> None:
    given: dict[str, Any] = {name: [value] if name == "init_tasks" else value}
    with pytest.raises(UserError, match=f"^{name} must be text in UTF-8 without zero characters, got '[^\n]*; rename"):
        RunConfig(**given)


def test_a_text_with_such_a_name_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "study.md", f"no results: {NO_UTF8}")
    assert (tmp_path / "study.md").read_text() == "no results: bad\\udcff"
