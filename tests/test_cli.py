"""The command line: help, lists, the plan, and what a user's mistakes look like. Never a traceback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cnext.cli import main, run_main


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "mage",
        "lora",
        "zero-shot",
        "tiny",
        "next-tiny",
        "HQEdit",
        "paper, reverse, alphabet, random:K",
        "smoke",
    ):
        assert name in shown


@pytest.mark.parametrize("verb", [["--help"], ["report", "--help"], ["pretrain-tiny", "--help"]], ids=" ".join)
def test_help(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(verb)
    assert stop.value.code == 0
    assert "usage: cnext" in capsys.readouterr().out


def test_help_of_a_method_shows_its_hyperparameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(["--method", "mage", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--mage.c" in shown
    assert "Plasticity" in shown


MISTAKES = {
    "method": (["--method", "mag"], "unknown method 'mag'; valid: lora, mage, zero-shot"),
    "order": (["--order", "backwards"], "unknown order 'backwards'; valid: paper, reverse, alphabet"),
    "suite": (["--suite", "coin"], "unknown suite 'coin'; valid: next-tiny"),
    "backbone": (["--backbone", "huge"], "unknown backbone 'huge'; valid: tiny"),
    "budget": (["--budget", "large"], "unknown budget 'large'; valid: default, smoke"),
    "device": (["--device", "toaster"], "unknown device 'toaster'; valid: auto, cpu, cuda"),
    "no such device": (["--device", "cuda:99"], "device cuda:99 is not there"),
    "negative seed": (["--seeds", "-1"], "seed must be at least 0, got -1"),
    "no threads": (["--threads", "0"], "threads must be at least 1, got 0"),
    "learning rate": (["--learning-rate", "nan"], "learning_rate must be positive and finite"),
    "data": (["--data", "nowhere"], "no file matches nowhere"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_message_and_status_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(flags) == 2
    shown = capsys.readouterr().err
    assert f"error: {message}" in shown
    assert "Traceback" not in shown


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run_main(["--data", str(data), "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: Not a directory")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full disk", "read-only"])
@pytest.mark.parametrize("writes", [1, 6], ids=["at the start", "in the middle"])
def test_a_disk_that_fails_is_one_line(
    code: int,
    writes: int,
    tmp_path: Path,
    toy_suite: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And when there is room again, the same command ends the run."""
    flags = [
        "--order",
        "VQAv2",
        "--suite",
        str(toy_suite),
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--block-steps",
        "1",
    ]
    calls = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= writes:
            raise OSError(code, os.strerror(code), "some/file")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        assert run_main(flags) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1] == f"error: {os.strerror(code)}: some/file"
    assert "Traceback" not in shown
    assert run_main(flags) == 0


def test_the_dry_run_shows_the_plan_and_leaves_nothing(
    tmp_path: Path, toy_suite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CNEXT_CACHE", str(tmp_path / "cache"))
    assert run_main(["--suite", str(toy_suite), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "plan: mage on tiny",
        "VQAv2",
        "text+image",
        "234,240",
        "estimated time:",
        "estimated disk:",
        "run folder:",
    ):
        assert part in shown
    assert list(tmp_path.iterdir()) == []


def test_several_seeds_make_a_table(
    tmp_path: Path, toy_suite: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "zero-shot", "lora", "--order", "VQAv2", "--seeds", "0", "1"]
    assert run_main([*flags, "--suite", str(toy_suite), "--data", str(data), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "±" in shown
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("results.json")) == [
        f"{method}/VQAv2/seed-{seed}" for method in ("lora", "zero-shot") for seed in (0, 1)
    ]


def test_hyperparameters_reach_the_run(tmp_path: Path, toy_suite: Path, data: Path) -> None:
    flags = [
        "--order",
        "VQAv2",
        "--suite",
        str(toy_suite),
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--mage.rank",
        "2",
    ]
    assert run_main(flags) == 0
    config = json.loads((tmp_path / "mage/VQAv2/seed-0/config.json").read_text())
    assert config["hyperparameters"]["rank"] == 2
    assert json.loads((tmp_path / "mage/VQAv2/seed-0/results.json").read_text())["cost"]["adapter_parameters"] == 78_080
