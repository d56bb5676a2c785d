"""Timing, memory and profiling helpers of the benchmarks and of ``gpu.py``."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
GPU = DEVICE == "cuda"
SMALL = bool(os.environ.get("CNEXT_BENCH_SMALL"))
"""Small shapes, to test the benchmarks themselves; times are meaningless."""
FLUSH_BYTES = 2**28
"""Written before every timed call; larger than the L2 cache of any GPU."""


def finish() -> None:
    """Waits for the device."""
    if GPU:
        torch.cuda.synchronize()


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, which is timed without the host's launches."""
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


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=DEVICE)


def race(candidates: Mapping[str, Callable[[], object]], rounds: int, *, graph: bool) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round; candidates alternate, on a GPU with flushed caches.

    On a GPU by CUDA events, of CUDA graphs where ``graph``; on a CPU by the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    if not GPU:
        for _ in range(rounds):
            for name, function in candidates.items():
                start = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - start) * 1e3)
        return times
    run = {name: captured(function) if graph else function for name, function in candidates.items()}
    for function in run.values():
        function()
    pairs = []
    for _ in range(rounds):
        for name, function in run.items():
            _flushed().zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            function()
            after.record()
            pairs.append((name, before, after))
    finish()
    for name, before, after in pairs:
        times[name].append(before.elapsed_time(after))
    return times


def percentiles(values: Sequence[float], unit: str = "ms") -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    return {
        unit: statistics.median(ordered),
        f"{unit}_p20": ordered[len(ordered) // 5],
        f"{unit}_p80": ordered[-1 - len(ordered) // 5],
    }


def ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Median and percentiles of the rounds' ratios: both of a round ran at the same clocks and temperature."""
    return percentiles([a / b for a, b in zip(times, baseline, strict=True)], "ratio")


def call_ms(function: Callable[[], object], calls: int) -> dict[str, float]:
    """Eager calls: wall time including the device's work, and the host's time until the call returns."""
    function()
    walls, hosts = [], []
    for _ in range(calls):
        finish()
        start = time.perf_counter()
        function()
        hosts.append((time.perf_counter() - start) * 1e3)
        finish()
        walls.append((time.perf_counter() - start) * 1e3)
    return {
        "wall_ms": statistics.median(walls),
        "host_ms": statistics.median(hosts),
        "best_wall_ms": min(walls),
        "best_host_ms": min(hosts),
    }


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak memory that a call allocates through torch, beyond what was allocated before."""
    function()
    finish()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    assert found.profiler is not None
    nodes = list(found.profiler.kineto_results.experimental_event_tree())
    sizes: list[tuple[int, int]] = []
    while nodes:
        node: Any = nodes.pop()
        nodes += node.children
        if node.tag == _EventType.Allocation:
            sizes.append((node.start_time_ns, node.extra_fields.alloc_size))
    assert sizes, "the profiler recorded no allocation"
    held = peak = 0
    for _, size in sorted(sizes, key=lambda one: one[0]):
        held += size
        peak = max(peak, held)
    return peak


def kernels(function: Callable[[], object], calls: int = 3) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds per call of every kernel, fills included; on a CPU of torch's ops."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    function()
    finish()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            function()
        finish()
    rows = []
    for event in found.key_averages():
        taken = event.self_device_time_total if GPU else event.self_cpu_time_total
        if taken and event.device_type is (DeviceType.CUDA if GPU else DeviceType.CPU):
            rows.append((event.key, event.count / calls, taken / calls))
    return sorted(rows, key=lambda row: -row[2])
