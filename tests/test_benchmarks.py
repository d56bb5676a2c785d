"""The benchmarks run as the README says, where the libraries of the tests are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import gpu
import psutil
import pytest
import torch
from waiting import outputs, until

ROOT = Path(__file__).parents[1]


def benchmarks(folder: Path, *words: object, **environment: str) -> tuple[int, str]:
    """Exit status and output of pytest, without the options of this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--benchmark-only", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, cwd=folder, env=kept | environment, **pipes)
    ((said, _),) = outputs([child])
    return child.returncode, said


def test_they_are_measured() -> None:
    status, said = benchmarks(ROOT, "bench/", "-k", "answers_at_once")
    assert status == 0, said
    assert re.search(r"benchmark: \d+ tests", said)
    assert re.search(r"[1-9]\d* passed", said)


def test_a_row_is_on_disk_before_the_next_race(tmp_path: Path) -> None:
    """A benchmark that is killed leaves the rows that it has measured."""
    rows = tmp_path / "rows.jsonl"
    (tmp_path / "bench_killed.py").write_text(
        "import os, signal\n"
        "from conftest import Race\n"
        "def test_first(benchmark, pytestconfig):\n"
        "    Race(benchmark, pytestconfig.getoption('rows')).run(lambda: 0, lambda: 0, rounds=2, what='first')\n"
        "def test_second(benchmark):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for name in ("conftest.py", "timing.py"):
        shutil.copy(ROOT / "bench" / name, tmp_path)
    words = ("--rootdir", tmp_path, "--rows", rows, tmp_path / "bench_killed.py")
    status, said = benchmarks(tmp_path, *words, PYTHONPATH=str(ROOT / "tests"), CNEXT_BENCH_SMALL="1")
    assert status == -signal.SIGKILL, said
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["what"] == "first"
    assert row["median_seconds"] > 0


class TestEvidenceFromAGpu:
    """`bench/gpu.py`, on a CPU."""

    def test_a_part_that_hangs_is_killed_with_all_that_it_started(self, tmp_path: Path) -> None:
        # The part waits for its child, which would wait for ever.
        number = tmp_path / "number"
        child = "import time; time.sleep(10**6)"
        part = (
            "import subprocess, sys, pathlib\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            f"pathlib.Path({str(number)!r}).write_text(str(child.pid))\n"
            "child.wait()\n"
        )
        limit = 2.0
        while not number.is_file():
            code, seconds = gpu.isolated([sys.executable, "-c", part], tmp_path / "log", limit)
            limit *= 2  # a loaded machine had not even started it
        assert code == "time limit"
        assert seconds >= 2.0
        pid = int(number.read_text())
        gone = not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        until(lambda: gone or not psutil.pid_exists(pid), [os.getpid()])

    def test_a_part_that_fails_stops_nothing_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "PARTS", {"a": ("nothing.here", 60), "ceilings": ("times.ceilings", 60)})
        # A part that is not known to the child ends with an error there; the next one is tried all the same.
        arguments = ["--rehearse", "--parts", "a,ceilings", "--out", str(tmp_path)]
        assert gpu.main(arguments) == 1
        rows = gpu.written(tmp_path / "rows.jsonl")
        codes = {row["part"]: row["code"] for row in rows if "code" in row}
        assert codes["a"] not in (0, "time limit")
        assert codes["ceilings"] == 0
        assert any(row.get("name") == "copy" for row in rows)
        assert "FAILED a: ended with" in (tmp_path / "summary.txt").read_text()

    def test_truncated_rows_are_skipped_and_faults_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(
            '{"part": "check", "name": "x", "ok": false, "error": 0.5}\n'
            '{"part": "check", "name": "y", "ok": true, "error": 1e-8}\n'
            '{"part": "layer", "name": "z", "error": "RuntimeError: no"}\n'
            '{"part": "run", "code": "time limit", "seconds": 70.0}\n'
            '{"part": "ru'
        )
        rows = gpu.written(file)
        assert len(rows) == 4
        found = gpu.faults(rows)
        assert [line.split(":")[0] for line in found] == ["check", "layer", "run"]
        assert "checks: 1 of 2 passed" in list(gpu.summary(rows))

    def test_a_later_row_is_tried_after_one_that_fails(self, tmp_path: Path) -> None:
        from evidence.recorder import Recorder

        recorder = Recorder(tmp_path / "rows.jsonl", "part", gpu=False)
        with recorder.attempt("first"):
            raise ValueError("what was wrong")
        with recorder.attempt("second"):
            recorder.put(name="second", ok=True)
        first, second = gpu.written(recorder.file)
        assert first == {"part": "part", "name": "first", "error": "ValueError: what was wrong"}
        assert second["ok"]

    def test_without_a_device_it_says_so_in_a_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert not torch.cuda.is_available()
        assert gpu.main([]) == 2
        assert capsys.readouterr().err.startswith("error: torch sees no CUDA device here; --rehearse")
        with pytest.raises(SystemExit) as end:
            gpu.main(["--parts", "checks"])
        assert end.value.code == 2
        assert "unknown part 'checks'; valid: ceilings, check" in capsys.readouterr().err

    def test_the_parts_fit_two_calls_of_ten_minutes(self) -> None:
        """What is expected is half of the limits; the first run took 154 s for most of the first call's parts."""
        first = sum(seconds for name, (_, seconds) in gpu.PARTS.items() if name not in gpu.LONG)
        assert first / 2 < 560 > max(seconds for _, seconds in gpu.PARTS.values())

    def test_needs_of_a_wheel_are_read_for_the_other_machine(self, tmp_path: Path) -> None:
        from evidence import wheels
        from packaging.markers import default_environment

        wheel = tmp_path / "some-1-py3-none-any.whl"
        with ZipFile(wheel, "w") as archive:
            lines = [
                "Metadata-Version: 2.1",
                "Name: some",
                "Requires-Dist: numpy>=2",
                'Requires-Dist: only-there; python_version < "3"',
                'Requires-Dist: extra-one; extra == "test"',
                'Requires-Dist: Some.Thing[x]; sys_platform == "linux"',
            ]
            archive.writestr("some-1.dist-info/METADATA", "\n".join(lines) + "\n\n")
        environment = {**default_environment(), "sys_platform": "linux"}
        assert list(wheels.needed(wheel, environment)) == ["numpy>=2", "Some.Thing[x]"]
        assert wheels.canonical("Some.Thing_x") == "some-thing-x"

    @pytest.mark.slow
    def test_the_rehearsal_is_right(self, tmp_path: Path) -> None:
        """The same program small: every part but the main job, which other tests run."""
        parts = ",".join(name for name in gpu.PARTS if name not in (*gpu.LONG, "run"))
        command = [sys.executable, str(ROOT / "bench/gpu.py"), "--rehearse", "--out", str(tmp_path), "--parts", parts]
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ((said, _),) = outputs([child])
        assert child.returncode == 0, said
        assert "FAILED" not in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "rows.jsonl", "summary.txt"]
        rows = gpu.written(tmp_path / "rows.jsonl")
        assert {row["part"] for row in rows} == {"machine", *parts.split(",")}
        checked = [row for row in rows if row["part"] == "check" and "ok" in row]
        assert len(checked) > 100

    if shutil.which("nvcc"):

        @pytest.mark.slow
        def test_the_sanitizer_s_program_compiles_without_a_warning(self, tmp_path: Path) -> None:
            from evidence.programs import compiling

            warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
            command = [*map(str, compiling(tmp_path / "program")), *warnings]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "program").is_file()
