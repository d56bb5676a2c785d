"""The command line: help, lists, the plan, and errors of one line without a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cnext
from cnext import methods
from cnext.cli import main, run_main
from cnext.scoring.clip import TINY_CLIP


@pytest.fixture
def toy(toy_suite: Path, data: Path, tmp_path: Path) -> list[str]:
    """Flags of a run of a few steps, with its run folder below tmp_path."""
    return ["--suite", str(toy_suite), "--data", str(data), "--out", str(tmp_path)]


VERBS = "list card report plot analyze table status metrics compare judge data export import evaluate doctor".split()
VERBS += ["validate"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], *([verb] for verb in VERBS), ["data", "check"], ["data", "subset"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(" ".join(["usage: cnext", *words, "[-h]"]))
        assert words or all(f"\n    {verb} " in shown for verb in VERBS)


def test_help_of_a_method_shows_its_hyperparameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(["--method", "mage", "--help-all"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--mage.c" in shown
    assert "Plasticity" in shown


ERRORS = {
    "method": (["--method", "mag"], "unknown method 'mag'; valid: "),
    "suite": (["--suite", "coins"], "unknown suite 'coins'; valid: coin, continual-next, mllm-cl-ability"),
    "backbone": (["--backbone", "huge"], "unknown backbone 'huge'; valid: emu3, hf, janus, seed-x, small, tiny"),
    "preset": (["--preset", "large"], "unknown preset 'large'; valid: default, smoke"),
    "old name of --preset": (["--budget=smoke"], "--budget is now --preset: use --preset smoke"),
    "old name of --checkpoint-interval": (["--block-steps", "7"], "--block-steps is now --checkpoint-interval: use"),
    "device": (["--device", "toaster"], "unknown device 'toaster'; valid: auto, cpu, cuda"),
    "device of no use": (["--device", "meta"], "unknown device 'meta'; valid: auto, cpu, cuda"),
    "no such device": (["--device", "cuda:99"], "device cuda:99 is not there"),
    "no such device, launched": (["--launcher", "slurm", "--device", "cuda:99", "--dry-run"], "device cuda:99 is not"),
    "launcher option without a value": (
        ["--launcher", "ray", "--launcher-option", "num_cpus"],
        "--launcher-option expects key=value, got 'num_cpus'",
    ),
    "launcher option twice": (
        ["--launcher", "ray", "--launcher-option", "a=1", "a=2"],
        "--launcher-option has a more than once",
    ),
    "launcher option alone": (["--launcher-option", "a=1"], "--launcher-option needs --launcher ray or slurm"),
    "no Slurm": (["--launcher", "slurm"], "expected Slurm's commands on this machine"),
    "GPUs of a run": (["--gpus", "2"], "--gpus needs --dry-run"),
    "no GPU": (["--dry-run", "--gpus", "0"], "--gpus must be at least 1"),
    "uneven GPUs": (["--dry-run", "--gpus", "3"], "--gpus 3 does not divide the batch size of VQAv2"),
    "negative seed": (["--seeds", "-1"], "seed must be at least 0, got -1"),
    "no threads": (["--threads", "0"], "threads must be at least 1, got 0"),
    "learning rate": (["--learning-rate", "nan"], "learning_rate must be at least 1e-12, got nan"),
    "data": (["--data", "nowhere"], "no file matches nowhere/VQAv2/annotations/*.jsonl; nowhere holds nothing: it is"),
    "data in a file": (["--data", "file"], "no file matches file/VQAv2/annotations/*.jsonl; file is a file, no folder"),
    "device map": (["--device-map", "balanced"], "the tiny backbone runs on one device and takes no device map, got"),
    "clip": (
        ["--clip", "nowhere.pt"],
        "unknown CLIP 'nowhere.pt', and no such file; valid: tiny, small, a file or folder",
    ),
}


@pytest.mark.parametrize(("flags", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_one_message_and_status_2(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert run_main(flags) == 2
    shown = capsys.readouterr().err
    assert f"error: {message}" in shown
    assert "Traceback" not in shown


def test_an_output_folder_that_cannot_be_created(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert run_main(["--data", str(data), "--out", str(tmp_path / "file")]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == f"error: expected a folder for the runs, {tmp_path / 'file'} is a file; give another --out"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full disk", "read-only"])
@pytest.mark.parametrize("syncs", [1, 40], ids=["at the start", "in the middle"])
def test_a_disk_error_is_one_line_and_the_run_resumes(
    code: int, syncs: int, toy: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*toy, "--order", "VQAv2", "--checkpoint-interval", "1"]
    calls = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= syncs:
            raise OSError(code, os.strerror(code), "some/file")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        assert run_main(flags) == 2
    shown = capsys.readouterr().err
    full = ["): some/file", "free some space, then run the same command again to resume from the last checkpoint"]
    expected = full if code == errno.ENOSPC and syncs > 1 else [f"error: {os.strerror(code)}: some/file"]
    assert all(line.endswith(end) for line, end in zip(shown.splitlines()[-len(expected) :], expected, strict=True))
    assert "Traceback" not in shown
    assert run_main(flags) == 0


def test_the_dry_run_shows_the_plan_and_writes_nothing(
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
        "169,984",
        "estimated time:",
        "estimated disk:",
        "run folder:",
    ):
        assert part in shown
    assert list(tmp_path.iterdir()) == []


def test_several_seeds_make_a_table(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([*toy, "--method", "zero-shot", "lora", "--order", "VQAv2", "--seeds", "0", "1"]) == 0
    shown = capsys.readouterr().out
    assert "±" in shown
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("results.json")) == [
        f"{method}/VQAv2/seed-{seed}" for method in ("lora", "zero-shot") for seed in (0, 1)
    ]


def test_hyperparameters_reach_the_run(toy: list[str], tmp_path: Path) -> None:
    assert run_main([*toy, "--order", "VQAv2", "--mage.rank", "2"]) == 0
    config = json.loads((tmp_path / "mage/VQAv2/seed-0/config.json").read_text())
    assert config["hyperparameters"]["rank"] == 2
    assert json.loads((tmp_path / "mage/VQAv2/seed-0/results.json").read_text())["cost"]["adapter_parameters"] == 78_080


def test_a_clip_file_scores_the_images(toy: list[str], tmp_path: Path) -> None:
    flags = [*toy, "--method", "zero-shot", "--order", "HQEdit"]
    for out, given in (("suite", []), ("path", ["--clip", str(TINY_CLIP)])):
        assert run_main([*flags, *given, "--out", str(tmp_path / out)]) == 0
    folders = [tmp_path / out / "zero-shot/HQEdit/seed-0" for out in ("suite", "path")]
    one, other = (json.loads((folder / "results.json").read_text())["score_matrix"] for folder in folders)
    assert one == other
    clips = [json.loads((folder / "config.json").read_text())["clip"] for folder in folders]
    assert clips == [None, str(TINY_CLIP)]


MATRIX = "after,A,B\nzero-shot,10,20\nA,60,25\nB,40,70\n"


def test_metrics_of_a_matrix_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "matrix.csv").write_text(MATRIX)
    assert main(["metrics", str(tmp_path / "matrix.csv")]) == 0
    shown = capsys.readouterr().out
    assert any(line.split()[:2] == ["forgetting", "20.00"] and "divisor T-1" in line for line in shown.splitlines())
    assert main(["metrics", str(tmp_path / "matrix.csv"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {
        "avg_acc": 55,
        "new_acc": 65,
        "forgetting": 20,
        "fwt": 5,
        "transfer": 25,
        "avg_hal": None,
        "omega": None,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "words",
    [
        "metrics matrix.csv",
        "metrics matrix.csv --json",
        "compare results.json --to results.json",
        "compare matrix.csv --to matrix.csv",
        "data check .",
    ],
)
def test_verbs_that_do_not_import_torch(words: str, tmp_path: Path) -> None:
    (tmp_path / "matrix.csv").write_text(MATRIX)
    conditions = dict.fromkeys(("suite", "backbone", "split", "samples", "budget"), "x")
    results = {"method": "lora", "profile": "strict", "tasks": ["A"], "score_matrix": [[5]], **conditions}
    (tmp_path / "results.json").write_text(json.dumps(results))
    fails = words.startswith("data")
    code = f"import sys; from cnext.cli import main; status = main({words.split()})"
    heavy = {"torch", "matplotlib", "transformers"} | (set() if fails else {"numpy"})
    code += f"; sys.exit(bool(status) != {fails} or bool(sys.modules.keys() & {heavy}))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def test_metrics_and_compare_read_a_run(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([*toy, "--method", "lora", "--order", "VQAv2,HQEdit"]) == 0
    folder = tmp_path / "lora" / "VQAv2-HQEdit" / "seed-0"
    capsys.readouterr()
    assert main(["metrics", str(folder / "results.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert {name: found[name] for name in metrics} == metrics

    assert main(["compare", str(folder), "--paper"]) == 2
    refusal = capsys.readouterr().err
    for text in ("suite: toy here, continual-next there", "backbone: tiny here, seed-x there", "tasks: VQAv2, HQEdit"):
        assert text in refusal
    assert main(["compare", str(folder), "--paper", "--anyway"]) == 0
    assert "LoRA of the paper" in capsys.readouterr().out
    assert main(["compare", str(folder), "--paper", "upper-bound", "--anyway", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["there"].startswith("Upper-Bound")
    assert main(["compare", str(folder), "--to", str(folder)]) == 0
    assert "+0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (["doctor", "--backbone", "huge"], "unknown backbone 'huge'; valid: emu3, hf, janus, seed-x, small, tiny"),
        (["doctor", "--suite", "coins"], "unknown suite 'coins'"),
        (["judge", "validate", "--every-stage", "--out", "judge"], "--every-stage needs run folders; leave it out"),
        (["report", "none"], "none is no run folder and holds none; expected config.json"),
        (["metrics", "none.csv"], "none.csv: expected a file, found nothing"),
        (["metrics", "matrix.txt"], "matrix.txt: expected a score matrix in a .csv or .json file"),
        (["compare", "none", "--paper"], "none: expected the results of a run, found nothing"),
        (["compare", "none", "--to", "other"], "none: expected the results of a run, found nothing"),
    ],
    ids=["doctor, backbone", "doctor, suite", "judge", "no report", "no file", "no matrix", "no run", "no runs"],
)
def test_a_wrong_command_is_an_error_of_one_line(
    verb: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(verb) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "mage",
        "lora",
        "zero-shot",
        "tiny",
        "next-tiny",
        "HQEdit",
        "paper, reverse, alphabet, random:K",
        "smoke",
    ):
        assert text in shown
    for name in ("coin", "continual-next", "mllm-cl-ability", "mllm-cl-domain", "ucit"):
        assert f"\n  {name:<16} " in shown
    assert "SEED-Data" not in shown
    assert main(["list", "continual-next"]) == 0
    shown = capsys.readouterr().out
    for part in ("SEED-Data-Grounding/annotations/*.jsonl", "(164,948 rows published)", "CC BY 4.0", "clip_image"):
        assert part in shown
    assert main(["list", "continual"]) == 2
    assert "unknown suite 'continual'; valid: coin" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", *methods.modules(), "--help-all"],
        ["--config", "run.yaml", "--help-all"],
        ["--version"],
        ["--mage.cc", "1"],
        ["--method", "ewc", "--seeds", "x"],
    ],
    ids=["help on every method", "help with a file", "version", "unknown flag", "wrong value"],
)
def test_flags_are_parsed_without_importing_torch(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("method: [mage, ewc]\nmage: {c: 2}\n")
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'transformers', 'PIL'}"
    code = f"import atexit, sys; atexit.register(lambda: print({heavy})); from cnext import cli; cli.run_main({flags})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def unread(words: list[str], folder: Path, *streams: str) -> subprocess.CompletedProcess[str]:
    """Runs the command with the named streams closed by their reader, as in ``| head -1``."""
    read, write = os.pipe()
    os.close(read)
    try:
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, write)
        return subprocess.run([sys.executable, "-m", "cnext", *words], cwd=folder, text=True, check=False, **given)
    finally:
        os.close(write)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["list"], ["run", "--help"], ["metrics", "matrix.csv"], ["data", "check", "--help"]],
    ids=" ".join,
)
def test_a_closed_pipe_is_not_an_error(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "matrix.csv").write_text(MATRIX)
    done = unread(words, tmp_path, "stdout")
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_status_with_closed_pipes(tmp_path: Path) -> None:
    for words in (["metrics", "none.csv"], ["run", "--order", "none"], ["none"]):
        assert unread(words, tmp_path, "stdout", "stderr").returncode == 2


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_runs_finish_with_closed_pipes(jobs: str, toy: list[str], tmp_path: Path) -> None:
    words = ["run", *toy, "--method", "zero-shot", "--order", "VQAv2", "--seeds", "0", "1", "--jobs", jobs]
    done = unread(words, tmp_path, "stdout", "stderr")
    assert done.returncode == 0
    assert len(list(tmp_path.glob("zero-shot/VQAv2/seed-?/report.html"))) == 2
    assert (tmp_path / "study.md").is_file()


if Path("/dev/full").exists():

    @pytest.mark.parametrize("words", [["list"], ["--help"], ["run", "--help"]], ids=" ".join)
    def test_output_to_a_full_disk_is_an_error_of_one_line(words: list[str], tmp_path: Path) -> None:
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "cnext", *words]
            done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"error: {os.strerror(errno.ENOSPC)}\n")


def test_the_version_and_its_location(tmp_path: Path) -> None:
    said = f"cnext {cnext.__version__} from {Path(cnext.__file__).parent}"
    scripts = [[sys.executable, "-m", "cnext"], [sys.executable, "-m", "cnext", "run"]]
    scripts += [[sys.executable, "-c", f"from cnext import cli; cli.{main}()"] for main in ("main", "run_main")]
    for script in scripts:
        done = subprocess.run([*script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(said)
        assert done.stdout.count("\n") == 1
