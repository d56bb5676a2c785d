"""Benchmarks of whole commands: wall time and peak memory of the main job, and of help and lists.

    pytest bench/bench_run.py --benchmark-only

Targets: on two cores preset smoke in 40 s and default in 180 s with 2 GB of memory, help and list in 0.5 s; of
next-real on one core preset default in 360 s with 3 GB.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "cnext"]


@pytest.mark.parametrize(
    ("suite", "preset", "seconds", "memory"),
    [("next-tiny", "smoke", 40, 2e9), ("next-tiny", "default", 180, 2e9), ("next-real", "default", 360, 3e9)],
)
def test_main_job(
    benchmark,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suite: str,
    preset: str,
    seconds: float,
    memory: float,
) -> None:
    """``cnext-run --method mage`` from start to report, with a newly generated suite."""
    monkeypatch.setenv("CNEXT_CACHE", str(tmp_path / "cache"))

    def command() -> None:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        flags = ["--method", "mage", "--suite", suite, "--preset", preset, "--out", str(tmp_path / "runs")]
        subprocess.run([*COMMAND, "run", *flags], cwd=tmp_path, check=True)

    benchmark.pedantic(command, rounds=1)
    folder = tmp_path / "runs" / "mage" / "paper" / "seed-0"
    results = json.loads((folder / "results.json").read_text())
    cost = json.loads((folder / "cost.json").read_text())
    assert results["finished"]
    benchmark.extra_info |= {
        "target_seconds": seconds,
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "target_peak_memory_bytes": memory,
        "avg_acc": results["metrics"]["avg_acc"],
        "forgetting": results["metrics"]["forgetting"],
        "stages": cost["stages"],
    }


@pytest.mark.parametrize("verb", [["--help"], ["list"], ["run", "--help"]], ids=" ".join)
def test_answers_at_once(benchmark, tmp_path: Path, verb: list[str]) -> None:
    """Help and lists import nothing heavy."""

    def command() -> None:
        subprocess.run([*COMMAND, *verb], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    benchmark.pedantic(command, rounds=5, warmup_rounds=1)
    benchmark.extra_info["target_seconds"] = 0.5
