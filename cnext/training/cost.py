"""What a run costs, measured: seconds, memory and energy of every stage. None: the system does not tell.

Of several processes the peaks are those of the one that takes the most.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")
PEAKS = ("peak_memory_bytes", "peak_device_memory_bytes")


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes, since it began or since `Meter.lap`."""
    for line in STATUS.read_text().splitlines() if STATUS.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Measures lap after lap, each from the end of the one before.

    Args:
        device: where the model is, as torch names it.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.whole = 0
        """The most memory resident in any lap so far, in bytes."""
        self._started, self._energy = time.perf_counter(), self._joules()

    def lap(self) -> dict[str, Any]:
        """seconds, energy_joules, and the peaks peak_memory_bytes (resident) and peak_device_memory_bytes.

        energy_joules is that of the whole GPU where the model is on one, else of the processor packages, other
        programs included.
        """
        now, energy = time.perf_counter(), self._joules()
        row = {
            "seconds": now - self._started,
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": None,
            "energy_joules": _spent(self._energy, energy),
        }
        if self.device.type == "cuda":
            row["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.whole = max(self.whole, row["peak_memory_bytes"])
        self._started, self._energy = now, energy
        if CLEAR.is_file():
            try:
                CLEAR.write_text("5")
            except PermissionError:
                # A system that does not let a process forget its peak: every lap then has that of the whole run.
                return row
        return row

    def _joules(self) -> dict[str, int]:
        """Counters of energy in microjoules by name; {} where none can be read."""
        if self.device.type == "cuda":
            return _gpu_energy(self.device)
        found = {}
        for counter in sorted(POWERCAP.glob("intel-rapl:[0-9]*/energy_uj")):
            if counter.parent.name.count(":") == 1:
                try:
                    found[counter.parent.name] = int(counter.read_text())
                except PermissionError:
                    return {}
        return found


def _spent(before: dict[str, int], after: dict[str, int]) -> float | None:
    """Joules between two readings. A counter that has begun again from 0 makes it unknown."""
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
        # A GPU that has no counter (MIG, older ones).
        return {}
    finally:
        pynvml.nvmlShutdown()


def together(laps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The laps of several processes as one: the longest, the highest peaks, and the energy of all their GPUs.

    Processes on a CPU read the same counters, those of the machine, so that of them the largest counts.
    """
    joules = [lap["energy_joules"] for lap in laps]
    gpus = any(lap["peak_device_memory_bytes"] is not None for lap in laps)
    return {
        **{key: _most(lap[key] for lap in laps) for key in ("seconds", *PEAKS)},
        "energy_joules": None if None in joules else sum(joules) if gpus else max(joules),
    }


def _most(values: Iterable[Any]) -> Any:
    """The largest of those that are known, else None."""
    return max((value for value in values if value is not None), default=None)


def added(row: dict[str, Any], kind: str, lap: dict[str, Any]) -> dict[str, Any]:
    """A stage's row with one more lap of "train" or "evaluate" in it: seconds and joules add up, of peaks the most."""
    row = {"train_seconds": 0.0, "evaluate_seconds": 0.0, "energy_joules": 0.0} | row
    row[f"{kind}_seconds"] += lap["seconds"]
    both = (row["energy_joules"], lap["energy_joules"])
    row["energy_joules"] = None if None in both else sum(both)
    for key in PEAKS:
        row[key] = _most((row.get(key), lap[key]))
    return row


def summary(ledger: dict[str, Any], meter: Meter, seconds: float) -> dict[str, Any]:
    """cost.json: every stage's row, and the whole. Times of an interrupted run are those of its saved steps.

    stored_bytes: what is kept between tasks after a stage, adapters included.  seconds: of this process.
    """
    stages = []
    for name, measured in ledger["measured"].items():
        trained = ledger["trained"].get(name, {"steps": 0, "tokens": 0})
        busy = measured["train_seconds"]
        stages.append(
            {
                "task": name,
                **measured,
                "stored_bytes": ledger["stored_by_stage"].get(name),
                "steps": trained["steps"],
                "tokens": trained["tokens"],
                "tokens_per_second": trained["tokens"] / busy if busy else None,
                "seconds_per_step": busy / trained["steps"] if trained["steps"] else None,
            }
        )
    energy = [row["energy_joules"] for row in stages]
    return {
        "stages": stages,
        "last_process_seconds": seconds,
        "total_seconds": sum(row["train_seconds"] + row["evaluate_seconds"] for row in stages),
        "peak_memory_bytes": max([meter.whole, *(row["peak_memory_bytes"] for row in stages)]),
        "peak_device_memory_bytes": _most(row["peak_device_memory_bytes"] for row in stages),
        "energy_joules": None if None in energy else sum(energy),
    }
