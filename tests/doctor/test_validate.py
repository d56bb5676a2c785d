"""``cnext validate``: every problem of a file with its line, or its runs; nothing is run or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnext.cli import main, run_main

BAD = {
    "method: [mage, lora, mgae]": "unknown method 'mgae'; valid: ",
    "learnig_rate: 1e-3": "unknown name learnig_rate; perhaps you meant learning_rate",
    "seeds: [0, one, -1]": "seeds: expected a whole number, got 'one'",
    'batch_size: "16"': "batch_size: expected a whole number, got the text '16' in quotes",
    "checkpointing: yes": "checkpointing: expected true or false, got 'yes'",
    "device: toaster": "unknown device 'toaster'; valid: auto, cpu, cuda, cuda:N",
    "on_bad_row: drop": "on_bad_row: expected one of refuse, skip, got 'drop'",
    "data: nowhere": "data: expected a folder with the suite's files, nowhere is no folder",
    "order: [paper, papr]": "unknown order 'papr'; valid: paper, ",
    "threads: 0": "threads must be at least 1, got 0",
    "clip: nowhere.pt": "unknown CLIP 'nowhere.pt', and no such file; valid: ",
    "ewc: {rank: 3}": "hyperparameters of ewc, which is not among the methods mage, lora",
    "mag: {c: 1}": "unknown method mag; perhaps you meant mage",
    "mage: {pul: 2e-2}": "unknown hyperparameter mage.pul; perhaps you meant mage.pull",
    "lora: {scale: high}": "lora.scale: expected a number, got 'high'",
}


def file(folder: Path, *lines: str) -> Path:
    path = folder / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_all_problems_are_shown_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = file(tmp_path, *BAD)
    assert main(["validate", str(path)]) == 2
    *shown, count = capsys.readouterr().out.splitlines()
    assert count == f"{len(BAD)} problems"
    for number, (line, (given, message)) in enumerate(zip(shown, BAD.items(), strict=True), 1):
        assert line.startswith(f"{path}:{number}: {message}"), given
    # cnext-run says the first of those that reading finds.
    assert run_main(["--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}:2: unknown name learnig_rate; perhaps you meant learning_rate (and 7 more; ")
    assert said.count("\n") == 1


TOGETHER = {
    "one after the other": (["method: lora", "init_tasks: [VQAv2]"], 2, "--init-tasks needs --init-from"),
    "a value out of range": (["mage:", "  average: foo"], 2, "mage: unknown averaging rule 'foo'"),
    "of the study": (["jobs: many"], 1, "--jobs must be auto or a number"),
    "suite": (["# first", "suite: coins"], 2, "unknown suite 'coins'"),
    "preset": (["preset: large"], 1, "unknown preset 'large'; valid: default, smoke"),
    "weights": (["backbone: janus", "weights: nowhere"], 2, "no folder nowhere: expected a folder with Janus"),
    "no data": (["suite: coin"], 1, "suite coin needs --data"),
}


@pytest.mark.parametrize(("lines", "number", "message"), TOGETHER.values(), ids=TOGETHER.keys())
def test_what_only_the_whole_file_shows(
    lines: list[str], number: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, *lines)
    assert main(["validate", str(path)]) == 2
    assert f"{path}:{number}: {message}" in capsys.readouterr().out


def test_the_runs_of_a_file(
    toy_suite: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["method: [lora, zero-shot]", "seeds: [0, 3]", "order: ['VQAv2,HQEdit']", "lora: {rank: 4}"]
    path = file(tmp_path, *lines, f"suite: {toy_suite}", f"data: {data}")
    assert main(["validate", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path}: 4 runs\n")
    assert "  method     lora: rank 4, " in shown
    assert "  order      VQAv2,HQEdit: VQAv2, HQEdit\n" in shown
    assert "  seeds      0, 3\n" in shown
    assert "  steps      8 of each run: VQAv2 4, HQEdit 4\n" in shown
    assert [path] == list(tmp_path.iterdir())


def test_data_that_no_run_reads_may_be_missing(
    toy_suite: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/VQAv2").symlink_to(data / "VQAv2")
    given = ["method: zero-shot", f"suite: {toy_suite}", f"data: {tmp_path / 'data'}", f"out: {tmp_path}"]
    assert main(["validate", str(file(tmp_path, *given, "order: VQAv2"))]) == 0
    capsys.readouterr()
    path = file(tmp_path, *given, "order: [VQAv2, 'VQAv2,HQEdit']")
    assert main(["validate", str(path)]) == 2
    assert f"{path}:3: no file matches {tmp_path / 'data'}/HQEdit" in capsys.readouterr().out
