"""Studies: parallel runs give the same results, failures are isolated, and errors are found before any run starts."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import children
import psutil
import pytest
from studies import fake_child
from studies.fake_child import CRASHES, ENDS_WELL, GOES_ON, KILLED, SAVES, USER_ERROR, signalled, soon
from training.toy import change

from cnext.cli import run_main
from cnext.config.plan import Plan, plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.monitoring.eta import Estimate
from cnext.monitoring.progress import Event, ForwardedProgress, StudyProgress
from cnext.runs.run_folder import RunFolder
from cnext.studies import local, resources
from cnext.studies import study as studies
from cnext.studies.flags import configs, parse
from cnext.studies.in_python import study
from cnext.studies.local import Failure
from cnext.studies.study import is_finished
from cnext.studies.usage_errors import line
from cnext.training import runner

ORDER = "VQAv2"


@pytest.fixture(scope="module")
def flags(toy_suite: Path, data: Path) -> list[str]:
    paths = {"--suite": toy_suite, "--data": data, "--order": ORDER, "--device": "cpu"}
    return [str(part) for pair in paths.items() for part in pair]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in processes of their own are replaced by fake ones."""
    monkeypatch.setattr(local, "_run", fake_child.child)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def pid_in(log: Path) -> int:
    """The pid that a fake run writes into its log first."""
    assert soon(lambda: log.is_file() and log.read_text().endswith("\n")), log
    return int(log.read_text().split()[1])


def test_parallel_runs_give_the_same_results(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [*flags, "--method", "lora", "zero-shot", "--out", str(tmp_path / "several")]
    assert run_main([*several, "--jobs", "2"]) == 0
    shown = capsys.readouterr()
    assert "2 runs to do, 2 in parallel (--jobs)" in shown.err
    assert run_main([*flags, "--method", "lora", "--out", str(tmp_path / "one")]) == 0
    folder = "lora/VQAv2/seed-0"
    for name in ("results.json", "scores.jsonl", "train.jsonl", "config.json"):
        one, other = (tmp_path / out / folder / name for out in ("one", "several"))
        assert one.read_bytes() == other.read_bytes(), name
    assert "after 1 VQAv2" in (tmp_path / "several" / folder / "run.log").read_text()
    tables = {path.name: path.read_text() for path in (tmp_path / "several").glob("study.*")}
    assert sorted(tables) == ["study.csv", "study.html", "study.json", "study.md", "study.tex", "study.yaml"]
    assert tables["study.md"] in shown.out

    # The second time nothing is executed, and only the tables are written.
    monkeypatch.delattr(local, "run_in_sequence")
    monkeypatch.delattr(local, "run_in_parallel")
    (tmp_path / "several" / "study.md").unlink()
    assert run_main(several) == 0
    assert "2 of 2 runs are already finished" in capsys.readouterr().err
    assert (tmp_path / "several" / "study.md").read_text() == tables["study.md"]


@pytest.mark.usefixtures("fake")
def test_failures_of_parallel_runs_are_isolated(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = (KILLED, USER_ERROR, CRASHES, ENDS_WELL)
    flags = [*flags, "--method", "lora", "--out", str(tmp_path), "--jobs", "2"]
    assert run_main([*flags, "--seeds", *map(str, seeds)]) == 1
    shown = capsys.readouterr()
    folder = tmp_path / "lora/VQAv2"
    for seed, why in (
        (KILLED, "ended by signal 9, Killed; the system does this when memory runs out"),
        (USER_ERROR, "exit status 2"),
        (CRASHES, "exit status 1"),
    ):
        assert f"failed: lora/VQAv2/seed-{seed} ({why}), run folder {folder}/seed-{seed}" in shown.err
    assert "    error: the data is bad" in shown.err
    assert "    RuntimeError: a tensor is bad" in shown.err
    assert "3 of 4 runs failed; the same command runs only these again" in shown.err
    assert "lora/VQAv2/seed-0: step 1 of 4; 0 min 03 s left" in shown.err
    assert json.loads((tmp_path / "study.json").read_text())["rows"][0]["seeds"] == [ENDS_WELL]
    assert f"left out: {folder}/seed-{KILLED}, {folder}/seed-{USER_ERROR}" in shown.out.replace("\n", " ").replace(
        "\\_", "_"
    )

    assert run_main([*flags, "--seeds", str(ENDS_WELL), str(USER_ERROR), "7"]) == 2, "user errors alone"
    shown = capsys.readouterr().err
    assert "1 of 3 runs are already finished" in shown
    assert "2 runs to do" in shown


@pytest.fixture
def interruptible() -> Iterator[None]:
    """The interrupt key raises, as at a terminal; a shell's background jobs are started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("fake", "interruptible")
@pytest.mark.parametrize(
    ("seed", "number", "status"),
    [(GOES_ON, signal.SIGINT, 130), (SAVES, signal.SIGTERM, 0), (SAVES, signal.SIGINT, 130)],
    ids=["nothing to save", "SIGTERM", "SIGINT"],
)
def test_a_stopped_study_waits_until_every_run_has_saved_and_ended(
    seed: int, number: signal.Signals, status: int, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / f"{method}/VQAv2/seed-{seed}" for method in ("lora", "mage")]
    arguments = ["--method", "lora", "mage", "ewc", "--seeds", str(seed), "--out", str(tmp_path), "--jobs", "2"]
    with signalled(number, lambda: [pid_in(folder / "run.log") for folder in folders]) as found:
        assert run_main([*flags, *arguments]) == status
    said = f"stopped by {number.name}: everything finished is saved; run the same command again"
    assert said in capsys.readouterr().err
    [pids] = found
    assert len(pids) == 2
    assert all(map(gone, pids))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for folder in folders if seed == SAVES else ():
        assert (folder / "saved").is_file()
        assert "stopped by SIGTERM: saved after step 3; run the same command again" in (folder / "run.log").read_text()
    assert not (tmp_path / f"ewc/VQAv2/seed-{seed}/run.log").exists(), "no other run is started"


@pytest.mark.usefixtures("fake")
def test_a_run_that_is_stopped_alone_is_a_failure(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [tmp_path / f"{method}/VQAv2/seed-{SAVES}/run.log" for method in ("lora", "mage")]
    thread = threading.Thread(target=lambda: [os.kill(pid_in(log), signal.SIGTERM) for log in logs])
    thread.start()
    arguments = ["--method", "lora", "mage", "--seeds", str(SAVES), "--out", str(tmp_path), "--jobs", "2"]
    assert run_main([*flags, *arguments]) == 1
    thread.join()
    shown = capsys.readouterr().err
    assert f"failed: lora/VQAv2/seed-{SAVES} (stopped by a signal, and progress saved)" in shown
    assert "2 of 2 runs failed; the same command runs only these again" in shown


def test_a_run_does_not_outlive_its_study(tmp_path: Path) -> None:
    """After SIGKILL of the study, the run notices at its next progress event."""
    code = f"from studies import fake_child; fake_child.forever({str(tmp_path)!r})"
    study = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=children.environment(),
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / f"mage/paper/seed-{GOES_ON}/run.log"
    pid = pid_in(log)
    assert not gone(pid)
    study.kill()
    study.wait()
    assert soon(lambda: "the process of the study is gone" in log.read_text())


def test_failures_of_runs_in_one_process_are_isolated(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        runner, "run", lambda config, _: fake_child.run(config, SimpleNamespace(send=lambda event: None))
    )
    flags = [*flags, "--method", "lora", "--out", str(tmp_path), "--jobs", "1", "--seeds"]
    assert run_main([*flags, str(CRASHES), str(USER_ERROR), str(ENDS_WELL)]) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: a tensor is bad" in shown
    assert "error: the data is bad" in shown
    assert (tmp_path / "study.md").is_file()
    assert run_main([*flags, str(USER_ERROR), str(ENDS_WELL)]) == 2


def test_without_its_baseline_there_is_no_table(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, _: object) -> None:
        if config.method == "mage":
            raise UserError("the data is bad")
        fake_child.write_results(config)

    monkeypatch.setattr(runner, "run", run)
    methods = ["--method", "lora", "mage", "--out", str(tmp_path), "--jobs", "1"]
    assert run_main([*flags, *methods, "--baseline", "mage"]) == 2
    shown = capsys.readouterr().err
    assert "no table: no run of mage is finished" in shown
    assert "failed: mage/VQAv2/seed-0" in shown
    assert run_main([*flags, *methods]) == 2
    assert "left out: " in (tmp_path / "study.md").read_text()


MISTAKES = {
    "no seed": (["--seeds"], "--seeds needs at least one value"),
    "no order": (["--order"], "--order needs at least one value"),
    "seed twice": (["--seeds", "0", "1", "0"], "--seeds has 0 more than once"),
    "method twice": (["--method", "lora", "lora"], "--method has lora more than once"),
    "order twice": (["--order", "paper", "paper"], "--order has paper more than once"),
    "other tasks": (["--order", "VQAv2", "VQAv2,HQEdit"], "order VQAv2 and order VQAv2,HQEdit are not comparable"),
    "same tasks": (
        ["--order", "paper", "VQAv2,ImageNet,Flickr30k,OCRVQA,RefCOCO,HQEdit"],
        "--order has the same order of tasks twice, as paper and as VQAv2,",
    ),
    "task twice": (["--order", "VQAv2,VQAv2"], "the order 'VQAv2,VQAv2' has VQAv2 more than once"),
    "unknown task": (["--order", "VQAv2,COCO"], "unknown task in the order 'VQAv2,COCO': 'COCO'"),
    "digit that is no number": (["--order", "random:\N{SUPERSCRIPT TWO}"], "unknown order 'random:"),
    "empty order": (["--order", ""], "the order is empty"),
    "no jobs": (["--jobs", "0"], "--jobs must be auto or a number of at least 1, got 0"),
    "jobs of words": (["--jobs", "many"], "--jobs must be auto or a number of at least 1, got many"),
    "baseline": (["--method", "mage", "lora", "--baseline", "ewc"], "unknown baseline 'ewc'; valid: mage, lora"),
}


@pytest.mark.parametrize(("wrong", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_errors_are_found_before_any_run_starts(
    wrong: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main([*flags, "--out", str(tmp_path / "runs"), *wrong]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--mage.rank", "x"], "--mage.rank: invalid literal for int() with base 10: 'x'; expected --mage.rank INT"),
        (["--mage.rank", "1.5"], "'1.5'; expected --mage.rank INT"),
        (["--mage.c", "-1"], "mage: c must be at least 1e-09, got -1.0"),
        (["--mage.cc", "1"], "Unrecognized options: --mage.cc, 1; perhaps you meant --mage.c FLOAT"),
        (
            ["--mage.strength", "1"],
            "hyperparameters of these methods: --mage.rank, --mage.scale, --mage.dropout, --mage.lr-factor,",
        ),
        (["--split", "train"], "Expected one of ('test', 'validation', 'reworded')"),
        (["--mage.average", "foo"], "unknown averaging rule 'foo'; valid: pema"),
        (["--lora.rank", "3"], "Unrecognized options: --lora.rank"),
        (["--seeds", "x"], "['x']; expected --seeds [INT [INT ...]]"),
    ],
    ids=["type", "no whole number", "range", "near miss", "unknown", "split", "choice", "other method", "seed"],
)
def test_a_wrong_flag_is_one_line_with_the_valid_choices(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(wrong) == 2
    [shown] = capsys.readouterr().err.splitlines()
    assert shown.startswith("error: ")
    assert message in shown
    assert len(shown) < 300


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("mage", "c", "2", "must be of type float, as 5.0 is, got '2'"),
        ("mage", "rank", 1.5, "must be of type int, as 8 is, got 1.5"),
        ("mage", "rank", True, "must be of type int, as 8 is, got True"),
        ("mage", "average", None, "must be of type str, as 'pema-kron' is, got None"),
        ("mr-lora", "oracle", 1, "must be of type bool, as False is, got 1"),
    ],
)
def test_a_hyperparameter_of_the_wrong_type(method: str, name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"hyperparameter {name} of {method} {message}")):
        plan(RunConfig(method=method, hyperparameters={name: value}))


def test_an_int_is_accepted_as_a_float() -> None:
    assert plan(RunConfig(hyperparameters={"c": 2})).hyperparameters["c"] == 2


def test_a_colored_narrow_box_is_one_line() -> None:
    rows = "| Error parsing --mage.c: could not |\n| convert 'x' |\n| ---- |\n| See --help |\n"
    box = f"\x1b[31m+-\x1b[0m Value error -+\n{rows}+--+\n"
    assert line(box) == "--mage.c: could not convert 'x'"


def test_an_order_with_missing_tasks_prints_a_note(
    toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    note = (
        "note: order VQAv2,HQEdit leaves out Flickr30k, ImageNet, OCRVQA, RefCOCO, which are neither trained nor tested"
    )
    note += "; orders of all tasks: paper, interleaved, reverse, alphabet, random:K"
    for order, expected in (("VQAv2,HQEdit", [note]), ("paper", [])):
        assert run_main(["--suite", str(toy_suite), "--order", order, "--method", "zero-shot", "--dry-run"]) == 0
        assert [row for row in capsys.readouterr().err.splitlines() if row.startswith("note:")] == expected


def test_a_folder_of_another_configuration_is_an_error(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lora/VQAv2/seed-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"method": "mage"}')
    (folder / "scores.jsonl").touch()
    assert run_main([*flags, "--method", "lora", "--seeds", "0", "1", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert f"{folder} holds a run of another configuration" in shown
    assert '  method: "mage" there, "lora" requested' in shown


def test_a_run_in_use_is_left_to_its_process_and_the_others_go_on(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[int] = []

    def execute(_: object, to_do: list[Plan]) -> list[Failure]:
        done.extend(planned.config.seed for planned in to_do)
        return []

    monkeypatch.setattr(studies, "_execute", execute)
    words = [*flags, "--method", "zero-shot", "--seeds", "0", "1", "2", "--out", str(tmp_path)]
    taken = plan(configs(parse(words))[1])
    with closing(RunFolder(taken.config.folder, taken.as_dict())):
        assert run_main(words) == 2
        shown = capsys.readouterr().err
        assert done == [0, 2]
        assert f"failed: zero-shot/{ORDER}/seed-1 (in use)" in shown
        assert "1 of 3 runs failed" in shown
        with pytest.raises(UserError, match=r"^1 of 3 runs failed(.|\n)*another process is running in .*seed-1; wait"):
            study(taken.config, seeds=[0, 1, 2])
        assert done == [0, 2, 0, 2]
    assert run_main(words) == 0
    assert done[4:] == [0, 1, 2]


def test_checking_for_a_finished_run_changes_nothing(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither without a folder nor while another process has locked it, which is an error only to run in it."""
    flags = [*flags, "--method", "lora", "zero-shot", "--out", str(tmp_path / "runs")]
    planned = plan(configs(parse(flags))[0])
    folder = planned.config.folder
    assert not is_finished(planned)
    assert not (tmp_path / "runs").exists()
    with closing(RunFolder(folder, planned.as_dict())):
        assert run_main(flags) == 2
        assert f"another process is running in {folder}" in capsys.readouterr().err
        monkeypatch.delattr(fcntl, "flock")
        for report in (False, True):
            if report:
                fake_child.write_results(planned.config)
            files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            assert is_finished(planned) == report
            assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_the_dry_run_shows_totals_and_jobs(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--order", "VQAv2", "--method", "lora", "zero-shot", "--seeds", "0", "3", "--jobs", "2"]
    assert run_main([*flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("plan: ") == 2
    assert "the same with seed 3: runs/lora/VQAv2/seed-3" in shown
    assert "all 4 runs: " in shown
    assert "with 2 in parallel; " in shown
    assert "4 runs to do, 2 in parallel (--jobs)" in shown
    assert list(tmp_path.iterdir()) == []


def plans(count: int, backbone: str = "tiny", device: str = "cpu", threads: int = 1) -> list[SimpleNamespace]:
    config = SimpleNamespace(backbone=backbone, threads=threads)
    return [SimpleNamespace(config=config, device=device)] * count


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes 8 cores and some available memory, and a root folder with files of control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)

    def make(memory: float = 16.4e9, **files: str) -> Path:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def test_parallel_runs_are_limited_by_cores_and_memory(machine: Callable[..., Path]) -> None:
    root = machine()
    assert resources.parallel_runs(plans(3), root=root)[0] == 3
    assert resources.parallel_runs(plans(30), root=root) == (
        8,
        "30 runs to do, 8 in parallel (8 cores, 1 per run; 16.4 GB of memory, 1.1 per run)",
    )
    assert resources.parallel_runs(plans(30, threads=3), root=root)[0] == 2
    assert resources.parallel_runs(plans(30, threads=16), root=root)[0] == 1
    machine(2.5e9)
    assert resources.parallel_runs(plans(30), root=root)[0] == 2
    machine(2.5e6)
    assert resources.parallel_runs(plans(30), root=root)[0] == 1
    assert resources.parallel_runs(plans(30), "5", root=root)[0] == 5
    assert resources.parallel_runs(plans(3), "5", root=root)[0] == 3


def test_one_run_at_a_time_on_a_gpu_or_of_unknown_memory(machine: Callable[..., Path]) -> None:
    assert resources.parallel_runs(plans(9, device="cuda:0"), root=machine())[0] == 1
    found, why = resources.parallel_runs(plans(9, backbone="seed-x"), root=machine())
    assert found == 1
    assert "the memory of a run on seed-x is not known" in why


CONTROL_GROUPS = {
    "v2, own group": {
        "proc/self/cgroup": "0::/box/run\n",
        "sys/fs/cgroup/box/run/memory.max": "5000000000\n",
        "sys/fs/cgroup/box/run/memory.current": "2000000000\n",
        "sys/fs/cgroup/box/run/memory.stat": "anon 1\ninactive_file 500000000\n",
        "sys/fs/cgroup/box/run/cpu.max": "250000 100000\n",
    },
    "v2, group above": {
        "proc/self/cgroup": "0::/box/run\n",
        "sys/fs/cgroup/box/run/memory.max": "max\n",
        "sys/fs/cgroup/box/run/cpu.max": "max 100000\n",
        "sys/fs/cgroup/box/memory.max": "3500000000\n",
        "sys/fs/cgroup/box/memory.current": "0\n",
        "sys/fs/cgroup/box/cpu.max": "250000 100000\n",
    },
    "v1, at the root of a container": {
        "proc/self/cgroup": "4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "3500000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
}


@pytest.mark.parametrize("files", CONTROL_GROUPS.values(), ids=CONTROL_GROUPS.keys())
def test_limits_of_control_groups(files: dict[str, str], machine: Callable[..., Path]) -> None:
    root = machine(**files)
    assert resources.available_memory(root) == 3.5e9
    assert resources.available_cores(root) == 2.5
    assert resources.parallel_runs(plans(30), root=root)[0] == 2


def test_a_control_group_without_a_quota(machine: Callable[..., Path]) -> None:
    files = {"proc/self/cgroup": "2:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}
    assert resources.available_cores(machine(**files, **{"sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"})) == 8


def test_a_run_forwards_its_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-shot and stage 1 of two tasks: evaluations of 2 s, steps of 1 s but for the first, which is not timed."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    events: list[Event] = []
    progress = ForwardedProgress(events.append)
    config, recipe = SimpleNamespace(method="lora"), SimpleNamespace(steps={"a": 3, "b": 5})
    progress.plan(SimpleNamespace(config=config, recipe=recipe, order=("a", "b"), evaluations=[2, 1, 2]), 0, 0)
    assert events[-1] == Event("starting", Estimate(0.0, None, None))

    def evaluate(stage: int, task: str) -> None:
        with progress.evaluating(stage, "x", task, 8):
            clock[0] += 2.0

    for task in ("a", "b"):
        evaluate(0, task)
    progress.stage(0, "zero-shot", {"a": 40.0, "b": 50.0})
    assert events[-1].line
    assert "mean 45.0" in events[-1].doing
    assert events[-1].estimate.left is None, "no step has been timed"
    for step in (1, 2, 3):
        clock[0] += 1.0
        progress.step(1, "a", step, 3, 0.5)
    # To come: 5 steps of 1 s and 3 evaluations of 2 s, of 8 steps and 5 evaluations.
    assert dataclasses.astuple(events[-1].estimate) == pytest.approx((7 / 18, 11.0, 18.0))


def test_the_time_left_of_a_study() -> None:
    with StudyProgress(4, 2) as shown:
        assert shown.eta.left() is None
        shown.start("a")
        shown.start("b")
        assert shown.eta.left() is None
        shown.update("a", Event("", Estimate(0.25, 30.0, 40.0)))
        assert shown.eta.left() == pytest.approx((30 + 3 * 40) / 2), "the others take as long as the whole of a"
        shown.update("b", Event("", Estimate(0.25, 90.0, 100.0)))
        assert shown.eta.left() == pytest.approx((30 + 90 + 2 * 70) / 2)
        shown.end("a", "failed", failed=True)
        shown.end("b", "50.0")
        shown.start("c")
        shown.start("d")
        shown.update("c", Event("", Estimate(0.25, 1.0, 4.0)))
        shown.update("d", Event("", Estimate(0.25, 9.0, 4.0)))
        assert shown.eta.left() == 9.0, "at least the longest"


def test_bad_data_is_reported_once_before_any_process(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(tmp_path / "none"), "--method", "lora", "mage", "--jobs", "2"]
    assert run_main([*flags, *arguments, "--out", str(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "no file matches" in line]
    assert len(lines) == len({*lines}) == 3, "train, test and the held-out set, each once"
    assert not list(tmp_path.rglob("run.log"))


ALL = ["VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit"]


@pytest.mark.parametrize(
    ("orders", "expected", "label"),
    [
        ({"mine": ALL[::-1], "other": ALL}, "mine", "mine"),
        ({"mine": ALL[::-1], "paper": ALL}, "paper", "paper"),
        ({}, ",".join(ALL), "-".join(ALL)),
    ],
    ids=["its first", "paper", "none"],
)
def test_the_default_order_is_one_of_the_suite(
    orders: dict[str, list[str]],
    expected: str,
    label: str,
    toy_suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite, ran = shutil.copytree(toy_suite, tmp_path / "suite"), []
    change(suite / "suite.json", orders=orders)
    config = RunConfig(suite=str(suite))
    planned = plan(config)
    assert planned.as_dict()["order"] == expected
    assert planned.order == tuple(orders.get(expected, ALL))
    assert config.folder == planned.config.folder == Path("runs/mage") / label / "seed-0"
    monkeypatch.setattr(runner, "run", lambda config, *_: ran.append(config.folder))
    assert run_main(["--suite", str(suite)]) == 0
    assert ran == [config.folder]
    if "paper" not in orders:
        assert run_main(["--suite", str(suite), "--order", "paper"]) == 2
        names = "".join(f"{name}, " for name in orders)
        assert f"unknown order 'paper'; valid: {names}reverse, alphabet" in capsys.readouterr().err
