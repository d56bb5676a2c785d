"""How many runs to do in parallel, from the CPU cores and the memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cnext.config.plan import Plan

PEAK_MEMORY = {"tiny": 1.1e9, "small": 1.9e9}
"""Peak memory of one run in bytes, by backbone, where it has been measured (``cost.json`` of runs)."""


def parallel_runs(plans: list[Plan], jobs: str = "auto", root: Path = Path("/")) -> tuple[int, str]:
    """How many of the runs to do in parallel, and a line that says why.

    Args:
        jobs: "auto", or a number, which is used as it is.
        root: where /proc and /sys are mounted.
    """
    config, device = plans[0].config, plans[0].device
    peak = PEAK_MEMORY.get(config.backbone)
    if jobs != "auto":
        count, why = min(int(jobs), len(plans)), "--jobs"
    elif device.startswith("cuda"):
        count, why = 1, f"all on {device}; --jobs N for more"
    elif peak is None:
        count, why = 1, f"the memory of a run on {config.backbone} is not known; --jobs N for more"
    else:
        cores, memory = available_cores(root), available_memory(root)
        count = max(1, min(len(plans), int(cores / config.threads), int(memory / peak)))
        why = f"{cores:g} cores, {config.threads} per run; {memory / 1e9:.1f} GB of memory, {peak / 1e9:.1f} per run"
    return count, f"{len(plans)} runs to do, {count} in parallel ({why})"


def available_cores(root: Path = Path("/")) -> float:
    """CPU cores that this process may use: its affinity, at most the quota of its control groups."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _control_groups(root, "cpu"):
        limit = _read(group / "cpu.max") or _read(group / "cpu.cfs_quota_us") + _read(group / "cpu.cfs_period_us")
        if len(limit) == 2 and limit[0] not in ("max", "-1"):
            cores = min(cores, int(limit[0]) / int(limit[1]))
    return cores


def available_memory(root: Path = Path("/")) -> float:
    """Bytes of memory available without swapping: the machine's, at most what its control groups leave."""
    import psutil

    memory = float(psutil.virtual_memory().available)
    for group in _control_groups(root, "memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (value := _read(group / limit)) and value[0] != "max":
                # The page cache counts as used, and is reclaimed when memory runs short.
                stat = _read(group / "memory.stat")
                cache = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
                memory = min(memory, int(value[0]) - int(_read(group / usage)[0]) + cache)
    return max(0.0, memory)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups (version 1 and 2) and of their parents; psutil knows no limits."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = top / path.strip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _read(file: Path) -> list[str]:
    """The words of a file; none where there is no such file."""
    return file.read_text().split() if file.is_file() else []
