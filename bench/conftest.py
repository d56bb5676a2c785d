"""Timing against a yardstick in the same process: each round runs the yardstick first, then the candidate."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import tested_versions
import torch

DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
COPY_BYTES = 2**28 if DEVICE == "cpu" else 2**31


def pytest_configure(config: pytest.Config) -> None:
    tested_versions.configure(config)


def finish() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, the device's work included."""
    finish()
    start = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def transient_bytes(function: Callable[[], object]) -> int:
    """Peak memory that a call takes beyond what was held before it."""
    if DEVICE == "cuda":
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


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The call replayed from a CUDA graph: what the device takes, without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Race:
    """Times a candidate against a yardstick, in pairs, and books what a reader needs to judge the row."""

    def __init__(self, benchmark) -> None:
        self.benchmark = benchmark
        memory = torch.ones(COPY_BYTES // 8, device=DEVICE), torch.empty(COPY_BYTES // 8, device=DEVICE)
        self.copy = lambda: memory[1].copy_(memory[0])

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
        """One row: paired times of yardstick and candidate, peak transient memory, and share of copy bandwidth.

        The share is that of moving ``bytes_per_parameter``; 0 for what is bound by arithmetic, and then left out. With
        ``graph`` both are timed as CUDA graphs, for work so short that launching it would be what is measured.
        """
        for function in (candidate, yardstick, self.copy):
            function()
        transient = transient_bytes(candidate)
        if graph:
            candidate, yardstick = captured(candidate), captured(yardstick)
        other, copy = [], []

        def before() -> None:
            # Both of a pair follow a copy, and so find the same in the caches.
            self.copy()
            other.append(seconds(yardstick))
            copy.append(seconds(self.copy))

        def timed() -> None:
            candidate()
            finish()

        self.benchmark.pedantic(timed, setup=before, rounds=rounds)
        own = self.benchmark.stats.stats.data
        ratios = sorted(a / b for a, b in zip(own, other, strict=True))
        copied = COPY_BYTES / statistics.median(copy) / 1e9
        moved = parameters * bytes_per_parameter / statistics.median(own) / 1e9
        bandwidth = {
            "parameters": parameters,
            "parameters_per_second": parameters / statistics.median(own),
            "bytes_per_parameter": bytes_per_parameter,
            "gb_per_second": moved,
            "copy_gb_per_second": copied,
            "share_of_copy": moved / copied,
        }
        self.benchmark.extra_info |= {
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "graph": graph,
            **(bandwidth if bytes_per_parameter else {}),
            "time_over_yardstick": statistics.median(ratios),
            "time_over_yardstick_20_80": (ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]),
            "best_over_best": min(own) / min(other),
            "transient_bytes": transient,
            **booked,
        }


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark) -> Race:
    return Race(benchmark)
