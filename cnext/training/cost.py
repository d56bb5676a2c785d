"""Measure time, peak memory and energy of each stage. None stands for what the system does not report."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Lap:
    """What one stretch of a run took.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: largest resident memory of the process.
        peak_device_memory_bytes: largest memory that torch allocated on the GPU; None on a CPU.
        energy_joules: of the whole GPU where the model is on one, else of the processor packages, other programs
            included.
    """

    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None = None
    energy_joules: float | None = None


@dataclass
class StageCost:
    """What a stage took: seconds and joules are sums over its laps, the peaks maxima."""

    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    energy_joules: float | None = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None

    def add(self, kind: Literal["train", "evaluate"], lap: Lap) -> None:
        """Adds a lap of training or evaluation."""
        if kind == "train":
            self.train_seconds += lap.seconds
        else:
            self.evaluate_seconds += lap.seconds
        self.energy_joules = total((self.energy_joules, lap.energy_joules))
        self.peak_memory_bytes = max(self.peak_memory_bytes, lap.peak_memory_bytes)
        self.peak_device_memory_bytes = highest((self.peak_device_memory_bytes, lap.peak_device_memory_bytes))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since its start or the last `Meter.lap`."""
    for line in STATUS.read_text().splitlines() if STATUS.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Measures laps, each from the end of the one before. device: the model's, as torch names it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.peak_memory_bytes = 0
        """Largest of all laps so far."""
        self._started, self._energy = time.perf_counter(), self._counters()

    def lap(self) -> Lap:
        """Ends the present lap and begins the next."""
        now, energy = time.perf_counter(), self._counters()
        peak, device_peak = peak_memory(), None
        if self.device.type == "cuda":
            device_peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        lap = Lap(now - self._started, peak, device_peak, _joules(self._energy, energy))
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        self._started, self._energy = now, energy
        if CLEAR.is_file():
            # Where the peak may not be reset, every lap has that of the whole run.
            with suppress(PermissionError):
                CLEAR.write_text("5")
        return lap

    def _counters(self) -> dict[str, int]:
        """Energy counters in microjoules by name; {} where none can be read."""
        if self.device.type == "cuda":
            return _gpu_energy(self.device)
        counters = sorted(POWERCAP.glob("intel-rapl:[0-9]*/energy_uj"))
        try:
            return {p.parent.name: int(p.read_text()) for p in counters if p.parent.name.count(":") == 1}
        except PermissionError:
            return {}


def _joules(before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Joules between two readings; None where a counter has wrapped around."""
    if not after or before.keys() != after.keys() or any(after[name] < before[name] for name in after):
        return None
    return sum(after[name] - before[name] for name in after) / 1e6


def _gpu_energy(device: torch.device) -> dict[str, int]:
    """NVML's counter of a GPU, in microjoules; {} without NVIDIA's Python bindings."""
    import importlib.util

    if importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml  # pyright: ignore[reportMissingImports]

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return {"gpu": pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1000}
    except pynvml.NVMLError:
        # A GPU without a counter (MIG, older ones).
        return {}
    finally:
        pynvml.nvmlShutdown()


def combine(laps: Sequence[Lap]) -> Lap:
    """The laps of several processes as one: maxima, and the energy of all their GPUs.

    Processes on a CPU read the same counters, so the largest reading stands for all.
    """
    joules = [lap.energy_joules for lap in laps]
    on_gpus = any(lap.peak_device_memory_bytes is not None for lap in laps)
    return Lap(
        max(lap.seconds for lap in laps),
        max(lap.peak_memory_bytes for lap in laps),
        highest(lap.peak_device_memory_bytes for lap in laps),
        total(joules) if on_gpus or None in joules else highest(joules),
    )


def highest(values: Iterable[Any]) -> Any:
    """The largest of the known values; None where none is known."""
    return max((value for value in values if value is not None), default=None)


def total(values: Sequence[float | None]) -> float | None:
    """The sum; None where a value is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
