"""Cost of a run: laps against known memory, and sums over laps, processes and stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training.conftest import Make

from cnext import run
from cnext.analysis.run import Run
from cnext.report.record import costs
from cnext.training import cost, results
from cnext.training.cost import Lap, Meter, StageCost
from cnext.training.state import RunState, Trained

MEGABYTES = 1024 * 1024


def test_the_peak_of_a_lap_excludes_earlier_laps() -> None:
    meter = Meter("cpu")
    memory = torch.ones(256 * MEGABYTES // 4)
    large = meter.lap()
    del memory
    between = meter.lap()  # began before the memory was freed, so its peak may be the largest
    small = meter.lap()
    assert large.peak_memory_bytes - small.peak_memory_bytes > 200 * MEGABYTES
    assert meter.peak_memory_bytes == max(lap.peak_memory_bytes for lap in (large, between, small))
    assert large.peak_device_memory_bytes is None
    assert large.seconds > 0


def test_laps_add_up_to_a_stage() -> None:
    stage = StageCost()
    stage.add("train", Lap(2, 5, None, 1.0))
    stage.add("train", Lap(3, 4, None, 2.0))
    stage.add("evaluate", Lap(7, 6, None, 4.0))
    assert stage == StageCost(5, 7, 7.0, 6, None)
    stage.add("train", Lap(1, 1, 9, None))
    assert stage == StageCost(6, 7, None, 6, 9), "the energy of a part is unknown, so the sum is"


def test_laps_of_several_processes_are_one() -> None:
    """On GPUs energy adds up. On one machine's processor all have read the same counters."""
    laps = [Lap(2.0, 5, 7, 1.0), Lap(3.0, 4, 8, 2.0)]
    assert cost.combine(laps) == Lap(3.0, 5, 8, 3.0)
    assert cost.combine([Lap(2.0, 5, None, 1.0), Lap(3.0, 4, None, 2.0)]) == Lap(3.0, 5, None, 2.0)
    assert cost.combine([laps[0], Lap(3.0, 4, 8, None)]).energy_joules is None


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [({"a": 5, "b": 1}, {"a": 2_000_005, "b": 1_000_001}, 3.0), ({"a": 5}, {"a": 4}, None), ({}, {}, None)],
    ids=["two counters", "wrapped around", "none"],
)
def test_energy_between_two_readings(before: dict, after: dict, joules: float | None) -> None:
    assert cost._joules(before, after) == joules


def test_energy_is_read_from_processor_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("intel-rapl:0", 7), ("intel-rapl:1", 8), ("intel-rapl:0:0", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    monkeypatch.setattr(cost, "POWERCAP", tmp_path)
    assert Meter("cpu")._counters() == {"intel-rapl:0": 7, "intel-rapl:1": 8}


def test_cost_json_of_a_run(config: Make) -> None:
    made = config(order="VQAv2,HQEdit", method="ewc")
    outcome = run(made)
    found = json.loads((made.folder / "cost.json").read_text())
    assert [row["task"] for row in found["stages"]] == ["zero-shot", "VQAv2", "HQEdit"]
    zero, first, second = found["stages"]
    assert zero["tokens_per_second"] is None
    assert zero["train_seconds"] == 0
    for row in (first, second):
        assert row["tokens"] / row["train_seconds"] == pytest.approx(row["tokens_per_second"])
        assert row["peak_memory_bytes"] > 1e8
    assert second["stored_bytes"] == outcome["cost"]["stored_bytes"] >= first["stored_bytes"] > 312_320 * 4
    assert found["peak_memory_bytes"] >= max(row["peak_memory_bytes"] for row in found["stages"])
    assert found["energy_joules"] is None or found["energy_joules"] > 0


def test_the_report_shows_every_cost_of_every_stage() -> None:
    stage = {"train_seconds": 7.0, "evaluate_seconds": 3.0, "steps": 100, "seconds_per_step": 0.07}
    stage |= {"tokens_per_second": 4000.0, "stored_bytes": 2_500_000, "peak_memory_bytes": 1_300_000_000}
    measured = {"peak_device_memory_bytes": 3_000_000_000, "energy_joules": 4200.0}
    shown = costs(Run(Path(), {}, {}, {"stages": [{"task": "say", **stage, **measured}], "energy_joules": 4200.0}, {}))
    whole, table = shown.blocks
    assert ["energy", "4.20 kJ"] in whole.rows
    found = dict(zip(table.head, table.rows[0], strict=True))
    assert {"stored": "2.5 MB", "peak memory": "1.30 GB", "peak device memory": "3.00 GB"}.items() <= found.items()
    assert found["energy"] == "4.20 kJ"
    (table,) = costs(Run(Path(), {}, {}, {"stages": [{"task": "say", **stage}]}, {})).blocks
    assert "energy" not in table.head, "where no device tells it"


def test_the_whole_is_the_sum_of_its_stages() -> None:
    stage = StageCost(2.0, 0.0, 5.0, 3, 4)
    state = RunState(measured={"a": stage, "b": stage}, trained={"a": Trained(1, 4, 10)}, stored_by_stage={"a": 9})
    found = results.costs(state, Meter("cpu"), 1.0)
    assert (found["total_seconds"], found["energy_joules"], found["peak_device_memory_bytes"]) == (4.0, 10.0, 4)
    assert found["stages"][0]["seconds_per_step"] == 0.5
    assert found["stages"][1]["seconds_per_step"] is None
