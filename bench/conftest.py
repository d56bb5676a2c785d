"""Timing against a yardstick in the same process: each round runs the yardstick first, then the candidate."""

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
    parser.addoption("--rows", type=Path, metavar="FILE", help="append each row of a race to FILE once it is known")


def pytest_configure(config: pytest.Config) -> None:
    tested_versions.configure(config)


def seconds(function: Callable[[], object]) -> float:
    """Time of one call, the device's work included: by events on a GPU, by the clock on a CPU."""
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
    """Peak memory that a call takes beyond what was held before it."""
    if GPU:
        finish()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        finish()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier calls have freed
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak
    before = _status("VmRSS")
    function()
    return max(_status("VmHWM") - before, 0)


class Race:
    """Times a candidate against a yardstick, in pairs, and books what a reader needs to judge the row.

    Bandwidth is bytes read and bytes written by the program, over time. Two measures of what the memory gives are
    timed in every round, by torch, on as many threads and far beyond the caches: a copy from one buffer to another,
    and a buffer scaled in place. On a CPU whose stores go through the caches a copy also reads what it overwrites,
    which is not counted; what is written in place has been read, so scaling moves what is counted, no more.
    """

    def __init__(self, benchmark, rows: Path | None) -> None:
        """rows: the file to which every row is appended once it is known."""
        self.benchmark, self.rows = benchmark, rows
        memory = torch.ones(COPY_BYTES // 8, device=DEVICE), torch.empty(COPY_BYTES // 8, device=DEVICE)
        self.copy = lambda: memory[1].copy_(memory[0])
        self.scale = lambda: memory[0].mul_(1.0)  # as many bytes as the copy

    def run(
        self,
        candidate: Callable[[], object],
        yardstick: Callable[[], object],
        *,
        parameters: int = 0,
        bytes_per_parameter: float = 0.0,
        rounds: int = 20,
        graph: bool = False,
        **booked: object,
    ) -> None:
        """One row: paired times of yardstick and candidate, peak transient memory, and shares of bandwidth.

        The shares, medians of the rounds' own, are those of moving ``bytes_per_parameter``; 0 for what is bound by
        arithmetic, and then left out. With ``graph`` both are timed as CUDA graphs, and what the host takes to launch
        them is not measured; else eager.
        """
        for function in (candidate, yardstick, self.copy, self.scale):
            function()
        transient = transient_bytes(candidate)
        if graph:
            candidate, yardstick = captured(candidate), captured(yardstick)
        own, other, copy, scale = [], [], [], []

        def before() -> None:
            # Both of a pair follow a copy, and so find the same in the caches.
            self.copy()
            other.append(seconds(yardstick))
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
            "time_over_yardstick": statistics.median(ratios),
            "time_over_yardstick_20_80": (ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]),
            "best_over_best": min(own) / min(other),
            "transient_bytes": transient,
            **booked,
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
