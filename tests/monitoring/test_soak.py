"""Memory of a long run: two thousand optimizer steps take no more than the first hundreds."""

from __future__ import annotations

import gc
import os
import statistics
from pathlib import Path

import pytest
from rich.progress import ProgressSample
from training.toy import copy_suite, shallow

from cnext import RunConfig, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.monitoring.progress import Progress

STEPS, SAMPLED, COUNTED = 2000, 20, 250
WARM, ENDS = 400, 300
"""Steps until everything has been allocated once, and steps at both ends of the rest that are compared."""
GROWN = 3e6
"""Bytes that the allocator may hold by chance; a leak of 2 KB a step is more."""


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watched(Progress):
    """Measures every few steps of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, int] = {}
        self.objects: dict[int, int] = {}

    def step(self, stage: int, name: str, step: int, steps: int, loss: float) -> None:
        super().step(stage, name, step, steps, loss)
        if step % SAMPLED == 0:
            self.memory[step] = resident()
        if step % COUNTED == 0:
            gc.collect()
            # The bars keep the last thousand times of each, no more.
            self.objects[step] = sum(type(each) is not ProgressSample for each in gc.get_objects())


def growth(values: dict[int, int]) -> float:
    """Of the medians over the first steps that count and over the last."""
    first = [value for step, value in values.items() if WARM < step <= WARM + ENDS]
    last = [value for step, value in values.items() if step > STEPS - ENDS]
    return statistics.median(last) - statistics.median(first)


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_steps(
    tmp_path: Path, toy_suite: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyBackbone, "load", shallow(TinyBackbone.load))
    budget = {"steps": {"VQAv2": STEPS}, "train_samples": 4, "test_samples": 1, "batch_size": 1}
    suite = copy_suite(toy_suite, tmp_path / "suite", **budget)
    config = RunConfig(
        out=tmp_path / "runs", suite=str(suite), data=data, order="VQAv2", device="cpu", checkpoint_interval=100,
        method="mage", hyperparameters={"rank": 1},
    )  # fmt: skip
    watched = Watched()
    assert run(config, watched)["cost"]["optimizer_steps"] == STEPS
    assert len(watched.memory) == STEPS // SAMPLED
    assert growth(watched.memory) < GROWN, watched.memory
    assert growth(watched.objects) <= 50, watched.objects
