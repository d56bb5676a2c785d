"""``cnext status``: running, stopped, failed and finished runs, damaged files, and the time left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from studies.fake_child import write_results

from cnext import RunConfig, run
from cnext.cli import main
from cnext.errors import UserError
from cnext.monitoring import heartbeat, status
from cnext.monitoring.eta import RunEta, StudyEta, study_left
from cnext.monitoring.progress import Progress
from cnext.monitoring.signals import Stopped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run that has not started."""
    made = tmp_path / "runs" / "lora" / "a" / "seed-0"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    return made


def beat(folder: Path, **values: object) -> None:
    heartbeat.Heartbeat(folder)
    written = json.loads((folder / heartbeat.FILE).read_text())
    (folder / heartbeat.FILE).write_text(json.dumps(written | values))


def shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["status", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    return found


@pytest.fixture
def ended() -> Iterator[int]:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


PACE = {"doing": "stage 1 a: step 3 of 9, loss 0.5", "stage": 1, "task": "a", "step": 3, "steps": 9, "left": 60.0}
PACE |= {"seconds_per_step": 0.25, "whole": 90.0}


def test_a_running_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(folder, **PACE)
    heartbeat.log(folder, "after 0 zero-shot: a 50.0")
    found = shown(folder, capsys)
    assert found["state"] == "running"
    assert (found["stage"], found["task"], found["step"], found["steps"]) == (1, "a", 3, 9)
    assert found["left"] == pytest.approx(60, abs=5)
    assert found["log"].endswith("after 0 zero-shot: a 50.0")
    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out
    assert "running   stage 1 a: step 3 of 9, loss 0.5; 0.25 s a step; 1 min 00 s left" in lines
    assert "1 runs: 1 running; all runs: 1 min 00 s left" in lines


def test_a_warning_is_not_the_last_line_of_a_log(folder: Path) -> None:
    code = "import warnings\nfor text in ('old', 'older'):\n    warnings.warn(text, FutureWarning)\n"
    (folder / "script.py").write_text(code)
    heartbeat.log(folder, "after 0 zero-shot: a 50.0")
    said = subprocess.run([sys.executable, folder / "script.py"], capture_output=True, text=True, check=True).stderr
    assert said.splitlines()[-1].strip() == "warnings.warn(text, FutureWarning)"
    with open(folder / "run.log", "a") as file:
        file.write(said)
    assert heartbeat.last_line(folder).endswith("after 0 zero-shot: a 50.0")
    with open(folder / "run.log", "a") as file:
        file.write("Segmentation fault\n")
    assert heartbeat.last_line(folder) == "Segmentation fault"


def test_a_run_whose_process_is_gone_has_stopped(folder: Path, ended: int, capsys: pytest.CaptureFixture[str]) -> None:
    beat(folder, **PACE, pid=ended)
    found = shown(folder, capsys)
    assert found["state"] == "stopped"
    assert "its process is gone; run the same command again" in found["why"]


def test_a_process_of_the_same_id_is_not_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(folder, **PACE, start_time=1.0)
    assert shown(folder, capsys)["state"] == "stopped"


@pytest.mark.parametrize(("silent", "state"), [(30, "running"), (500, "stopped")])
def test_a_run_on_another_machine_sends_heartbeats(
    silent: int, state: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(folder, **PACE, host=f"not-{socket.gethostname()}", pid=1, time=time.time() - silent)
    found = shown(folder, capsys)
    assert found["state"] == state
    assert found["heard"] == pytest.approx(silent, abs=5)


def test_every_end_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(folder, capsys)["state"] == "waiting"
    for error, state, why in (
        (Stopped(signal.SIGTERM, "saved after step 3"), "stopped", "stopped by SIGTERM: saved after step 3"),
        (UserError("the data is bad"), "failed", "the data is bad"),
    ):
        progress = Progress(quiet=True)
        with pytest.raises(type(error)), progress.kept_in(folder):
            raise error
        found = shown(folder, capsys)
        assert found["state"] == state
        assert why in found["why"]
        assert why in found["log"]
    (folder / "config.json").unlink()
    write_results(RunConfig(out=folder.parents[2], method="lora", order="a"))
    with Progress(quiet=True).kept_in(folder):
        pass
    found = shown(folder, capsys)
    assert found["state"] == "finished"
    assert found["doing"] == "Avg.ACC 50.00  New.ACC 50.00"


def test_damaged_files_do_not_hide_other_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder.with_name("seed-1")
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / heartbeat.FILE).write_text("[1")
    beat(folder, **PACE)
    assert main(["status", str(folder.parents[1])]) == 0
    lines = capsys.readouterr().out
    assert "unknown   " in lines
    assert "2 runs: 1 running, 1 unknown" in lines
    assert main(["status", str(folder.parents[3] / "none")]) == 2


def test_the_time_left_of_all_runs(folder: Path) -> None:
    """Two run, and two wait, which take the mean of the wholes: (60 + 20 + 2 * 70) / 2."""
    for seed, values in enumerate(({**PACE}, {**PACE, "left": 20.0, "whole": 50.0}, None, None)):
        made = folder.with_name(f"seed-{seed}")
        made.mkdir(exist_ok=True)
        (made / "config.json").write_text("{}")
        if values:
            beat(made, **values)
    assert status.of_folders([folder.parents[1]]).left == pytest.approx(110, abs=5)
    assert study_left([None], [], 1) is None
    assert study_left([], [], 1) == 0.0


def test_a_heartbeat_that_cannot_be_written_stops_nothing(folder: Path) -> None:
    written = heartbeat.Heartbeat(folder)
    (folder / f"{heartbeat.FILE}.unfinished").mkdir()
    written.end("finished")
    beat = heartbeat.read(folder)
    assert beat is not None
    assert beat.state == "running"


def test_a_real_run_leaves_a_heartbeat_and_a_log(tmp_path: Path, toy_suite: Path, data: Path) -> None:
    seen = []

    class Watched(Progress):
        def step(self, *arguments: object) -> None:
            super().step(*arguments)
            seen.append(status.of_run(config.folder, time.time()))

    config = RunConfig(out=tmp_path, method="lora", suite=str(toy_suite), data=data, order="VQAv2", device="cpu")
    run(config, Watched())
    assert len(seen) == 4
    assert all(found.state == "running" and found.pid == os.getpid() for found in seen)
    assert status.of_run(config.folder, time.time()).state == "finished"
    text = (config.folder / "run.log").read_text()
    assert "after 1 VQAv2: VQAv2 " in text
    assert "Avg.ACC" in text
    assert "report: " in text


def test_the_time_left_of_runs_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs of two tasks with three steps: a step of 1 s, an answer of 2 s; nothing else takes time."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    study = StudyEta(3, 1)
    study.start("one")
    eta = RunEta([3, 3], [2, 1, 2], 0, 0)
    for _ in range(2):
        with eta.evaluation():
            clock[0] += 2
    for _ in range(3):
        clock[0] += 1
        eta.step()
    whole = 6 * 1 + 5 * 2
    estimate = eta.estimate()
    assert (estimate.left, estimate.whole) == (9.0, whole)
    assert estimate.share == pytest.approx(7 / 16)
    study.update("one", estimate)
    assert study.left() == 9 + 2 * whole
    clock[0] += 9
    study.end("one", failed=False)
    assert str(study) == "1 of 3 runs done; 0 min 32 s left"


def test_status_loads_no_torch(folder: Path) -> None:
    beat(folder, **PACE)
    code = "import sys; from cnext.cli import main; s = main(['status', '.']); sys.exit(s or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)
