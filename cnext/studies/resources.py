"""How many runs go side by side: as many as the processor's cores and the free memory allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cnext.config.run_config import Plan

NEEDED = {"tiny": 1.1e9}
"""Bytes of memory that one run takes at its peak, by backbone, where it has been measured (``bench/bench_run.py``)."""


def decide(plans: list[Plan], asked: str = "auto", root: Path = Path("/")) -> tuple[int, str]:
    """How many of the runs to do at a time, and a line that says why.

    Args: asked: "auto", or a number, which is obeyed.  root: where /proc and /sys are.
    """
    count = len(plans)
    config, device = plans[0].config, plans[0].device
    needed = NEEDED.get(config.backbone)
    if asked != "auto":
        jobs, why = min(int(asked), count), "as asked"
    elif device.startswith("cuda"):
        jobs, why = 1, f"all are on {device}; --jobs N for more"
    elif needed is None:
        jobs, why = 1, f"the memory that one on {config.backbone} needs is not known; --jobs N for more"
    else:
        available, free = cores(root), memory(root)
        jobs = max(1, min(count, int(available / config.threads), int(free / needed)))
        why = f"{available:g} cores, {config.threads} a run; {free / 1e9:.1f} GB of memory, {needed / 1e9:.1f} a run"
    return jobs, f"{count} runs to do, {jobs} at a time ({why})"


def cores(root: Path = Path("/")) -> float:
    """The cores that this process may use: its affinity, and the quota of its control groups."""
    least = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups(root, "cpu"):
        words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] not in ("max", "-1"):
            least = min(least, int(words[0]) / int(words[1]))
    return least


def memory(root: Path = Path("/")) -> float:
    """Bytes that may still be taken: the machine's, and what the control groups of this process leave."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    least = 1024.0 * _value(meminfo, "MemAvailable:")
    for group in _groups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = _words(group / limit)
            if words and words[0] != "max":
                # The cache of files counts as used and is given back when it is needed.
                cached = _value(group / "memory.stat", "inactive_file")
                least = min(least, int(words[0]) - int(_words(group / used)[0]) + cached)
    return max(0.0, least)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, from its own upwards, of version 2 and of version 1."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = top / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []


def _value(file: Path, key: str) -> int:
    """The number after a key in a file of lines "key number"."""
    words = _words(file)
    return int(words[words.index(key) + 1]) if key in words else 0
