"""Fixtures of the benchmarks: timing of a candidate in pairs with a baseline, in one process."""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tested_versions
import torch
from timing import DEVICE, GPU, SMALL, captured, finish

COPY_BYTES = 2**31 if GPU else 2**20 if SMALL else 2**28


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="FILE", help="append every row to FILE as it is measured")


def pytest_configure(config: pytest.Config) -> None:
    tested_versions.configure(config)


def seconds(function: Callable[[], object]) -> float:
    """Time of one call including the device's work: by CUDA events on a GPU, by the clock on a CPU."""
    finish()
    if GPU:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        finish()
        return before.elapsed_time(after) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def transient_bytes(function: Callable[[], object]) -> int:
    """Peak memory of a call beyond what was allocated before it."""
    if GPU:
        finish()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        finish()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


class Race:
    """Times a candidate against a baseline in pairs, and records time, memory and bandwidth.

    Bandwidth is bytes read plus bytes written by the program, over time. Every round also times two references of
    memory bandwidth by torch, on the same threads and far beyond the caches: a copy of a buffer, and a buffer scaled in
    place. On a CPU with write-allocate caches a copy also reads what it overwrites, which is not counted; scaling in
    place moves no more than is counted.
    """

    def __init__(self, benchmark, rows: Path | None) -> None:
        """rows: a file to append every row to."""
        self.benchmark, self.rows = benchmark, rows
        memory = torch.ones(COPY_BYTES // 8, device=DEVICE), torch.empty(COPY_BYTES // 8, device=DEVICE)
        self.copy = lambda: memory[1].copy_(memory[0])
        self.scale = lambda: memory[0].mul_(1.0)  # as many bytes as the copy

    def run(
        self,
        candidate: Callable[[], object],
        baseline: Callable[[], object],
        *,
        parameters: int = 0,
        bytes_per_parameter: float = 0.0,
        rounds: int = 20,
        graph: bool = False,
        **extra: object,
    ) -> None:
        """One row: paired times of baseline and candidate, peak transient memory, and shares of bandwidth.

        The shares, medians over the rounds, are those of moving ``bytes_per_parameter``; left out where it is 0
        (compute-bound). With ``graph`` both are timed as CUDA graphs, without the host's launches; else eager.
        """
        for function in (candidate, baseline, self.copy, self.scale):
            function()
        transient = transient_bytes(candidate)
        if graph:
            candidate, baseline = captured(candidate), captured(baseline)
        own, other, copy, scale = [], [], [], []

        def before() -> None:
            # Both of a pair follow a copy, and so start with the same caches.
            self.copy()
            other.append(seconds(baseline))
            scale.append(seconds(self.scale))
            copy.append(seconds(self.copy))

        self.benchmark.pedantic(lambda: own.append(seconds(candidate)), setup=before, rounds=rounds)
        ratios = sorted(a / b for a, b in zip(own, other, strict=True))
        moved = parameters * bytes_per_parameter

        def share(whole: list[float]) -> float:
            return statistics.median(moved / a / (COPY_BYTES / b) for a, b in zip(own, whole, strict=True))

        bandwidth = {
            "parameters": parameters,
            "parameters_per_second": parameters / statistics.median(own),
            "bytes_per_parameter": bytes_per_parameter,
            "gb_per_second": moved / statistics.median(own) / 1e9,
            "copy_gb_per_second": COPY_BYTES / statistics.median(copy) / 1e9,
            "share_of_copy": share(copy),
            "scale_gb_per_second": COPY_BYTES / statistics.median(scale) / 1e9,
            "share_of_scale": share(scale),
        }
        self.benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if GPU else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "graph": graph,
            "median_seconds": statistics.median(own),
            **(bandwidth if bytes_per_parameter else {}),
            "time_over_baseline": statistics.median(ratios),
            "time_over_baseline_20_80": (ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]),
            "best_over_best": min(own) / min(other),
            "transient_bytes": transient,
            **extra,
        }
        if self.rows is not None:
            row = {"name": self.benchmark.fullname, "group": self.benchmark.group, **self.benchmark.extra_info}
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark, pytestconfig: pytest.Config) -> Race:
    return Race(benchmark, pytestconfig.getoption("rows"))
