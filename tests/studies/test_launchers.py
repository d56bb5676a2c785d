"""Ray and submitit, both on this machine: results and resuming are those of a local run."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies.fake_child import signalled, soon

from cnext.cli import run_main
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.studies import launchers
from cnext.studies.launchers import ENGINES, Ended, Work
from cnext.tables import aggregate

ORDER = "VQAv2,Flickr30k,RefCOCO,HQEdit"
FOLDER = "lora/VQAv2-Flickr30k-RefCOCO-HQEdit/seed-0"
LAUNCHED = {"ray": ["--launcher", "ray"], "slurm": ["--launcher", "slurm", "--launcher-option", "cluster=local"]}
OPTIONS = {"ray": {}, "slurm": {"cluster": "local"}}
# Older Ray leaves its own processes and their files to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*(Popen|FileIO):pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "POLL", 0.1)


@pytest.fixture(scope="module")
def flags(toy_suite: Path, data: Path) -> list[str]:
    paths = {"--suite": toy_suite, "--data": data, "--order": ORDER, "--device": "cpu", "--method": "lora"}
    return [str(part) for pair in paths.items() for part in pair]


@pytest.fixture(scope="module")
def here(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without a launcher."""
    out = tmp_path_factory.mktemp("here")
    assert run_main([*flags, "--out", str(out)]) == 0
    return out / FOLDER


def seen(path: Path, words: str) -> bool:
    """Waits until a file contains some words."""
    return soon(lambda: path.is_file() and words in path.read_text())


@pytest.mark.parametrize("engine", LAUNCHED)
def test_a_stopped_run_resumes_to_the_same_results(
    engine: str, flags: list[str], here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = [*flags, *LAUNCHED[engine], "--out", str(tmp_path)]
    log = tmp_path / FOLDER / "run.log"
    with signalled(signal.SIGTERM, lambda: seen(log, "after 1 VQAv2")) as found:
        assert run_main(launched) == 0
    assert found == [True]
    shown = capsys.readouterr().err
    assert f"1 runs to do, 1 in parallel ({engine})" in shown
    assert f"{FOLDER}: stopped, and progress saved" in shown
    assert "stopped by SIGTERM" in log.read_text()
    assert aggregate.read(tmp_path / FOLDER) is None

    # With the launcher or without: a run resumes anywhere.
    assert run_main(launched if engine == "ray" else [*flags, "--out", str(tmp_path)]) == 0
    assert "resuming from" in log.read_text()
    for name in ("results.json", "scores.jsonl", "train.jsonl", "config.json"):
        assert (tmp_path / FOLDER / name).read_bytes() == (here / name).read_bytes(), name


JOB = """
import signal, sys, time
def stop(*_):
    print("SIGTERM", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
sys.exit(int(sys.argv[1])) if sys.argv[1].isdecimal() else time.sleep(100)
"""


@pytest.fixture
def background() -> Iterator[None]:
    """As a background job of a shell, which starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("background")
@pytest.mark.parametrize("engine", ENGINES)
def test_how_a_job_ends(engine: str, tmp_path: Path) -> None:
    """With its run's exit status or without one; cancelling it sends SIGTERM to the run."""
    with launchers.interruptible():
        made = ENGINES[engine](OPTIONS[engine], tmp_path)

    def submit(label: str, *command: str) -> Any:
        work = Work(command, str(tmp_path), str(tmp_path / f"{label}.log"))
        with launchers.interruptible():
            return made.submit(work, RunConfig(method="lora"), "cpu")

    def end(handle: Any) -> Ended:
        while (ended := made.ended(handle)) is None:
            time.sleep(0.05)
        return ended

    try:
        waits = submit("waits", sys.executable, "-c", JOB, "wait")
        fails = submit("fails", sys.executable, "-c", JOB, "2")
        lost = submit("lost", "no-such-program")
        assert seen(tmp_path / "waits.log", "started")
        assert made.ended(waits) is None
        assert end(fails) == Ended(2)
        made.cancel(waits)
        assert seen(tmp_path / "waits.log", "SIGTERM")
        end(waits)
        ended = end(lost)
        assert ended.status is None
        assert "no-such-program" in ended.reason
        made.options["no_such_option"] = 1
        with pytest.raises(UserError, match="--launcher-option expects"):
            submit("refused", "true")
    finally:
        made.close()


def test_a_killed_run_is_reported_with_the_end_of_its_log(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("sh", "-c", "echo so far so good; kill -9 $$")
    engine = SimpleNamespace(submit=lambda work, *_: replace(work, command=command)(), ended=Ended, close=bool)
    monkeypatch.setitem(launchers.ENGINES, "slurm", lambda *_: engine)
    assert run_main([*flags, "--launcher", "slurm", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert f"failed: {FOLDER} (ended by signal 9, Killed; the system does this when memory runs out)" in shown
    assert "    so far so good" in shown


def test_a_job_does_not_import_cnext_from_its_folder(
    flags: list[str], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "folder" / "cnext"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(other.parent)
    engine = SimpleNamespace(submit=lambda work, *_: work(), ended=Ended, close=bool)
    monkeypatch.setitem(launchers.ENGINES, "slurm", lambda *_: engine)
    assert run_main([*flags, "--launcher", "slurm", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / FOLDER / "results.json").read_bytes() == (here / "results.json").read_bytes()


def test_options() -> None:
    given = ["slurm_partition=gpu", "timeout_min=60", "mem_gb=1.5", "slurm_comment=a=b"]
    assert launchers.options(given) == {
        "slurm_partition": "gpu",
        "timeout_min": 60,
        "mem_gb": 1.5,
        "slurm_comment": "a=b",
    }


@pytest.mark.parametrize("engine", LAUNCHED)
def test_a_launcher_that_is_not_installed(
    engine: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert run_main([*flags, "--launcher", engine, "--out", str(tmp_path)]) == 2
    assert f"pip install 'cnext[{engine}]'" in capsys.readouterr().err


def test_the_device_of_another_machine_is_not_checked(flags: list[str], tmp_path: Path) -> None:
    config = RunConfig(method="lora", device="cuda:99", out=tmp_path)
    with pytest.raises(UserError, match="cuda:99 is not there"):
        plan(config)
    assert plan(config, elsewhere=True).device == "cuda:99"
