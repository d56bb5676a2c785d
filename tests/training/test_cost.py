"""What is measured of a run: laps against what they hold, and sums over laps and stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cnext import RunConfig, run
from cnext.analysis.run import Run
from cnext.report.record import costs
from cnext.training import cost
from cnext.training.cost import Meter, added, summary

MEGABYTES = 1024 * 1024


def test_a_lap_s_peak_is_its_own() -> None:
    meter = Meter("cpu")
    block = torch.ones(256 * MEGABYTES // 4)
    large = meter.lap()
    del block
    between = meter.lap()  # began with the block still there, so that its peak may be the highest of all
    small = meter.lap()
    assert large["peak_memory_bytes"] - small["peak_memory_bytes"] > 200 * MEGABYTES
    assert meter.whole == max(lap["peak_memory_bytes"] for lap in (large, between, small))
    assert large["peak_device_memory_bytes"] is None
    assert large["seconds"] > 0


def test_laps_add_up() -> None:
    def lap(seconds: float, resident: int, joules: float | None) -> dict:
        return {
            "seconds": seconds,
            "peak_memory_bytes": resident,
            "peak_device_memory_bytes": None,
            "energy_joules": joules,
        }

    row = added(added(added({}, "train", lap(2, 5, 1.0)), "train", lap(3, 4, 2.0)), "evaluate", lap(7, 6, 4.0))
    assert (row["train_seconds"], row["evaluate_seconds"], row["peak_memory_bytes"]) == (5, 7, 6)
    assert row["energy_joules"] == 7.0
    assert row["peak_device_memory_bytes"] is None
    assert added(row, "train", lap(1, 1, None))["energy_joules"] is None, "part of it is unknown, so all of it is"


def test_laps_of_several_processes_are_one() -> None:
    """A GPU each: their energy adds up. On one machine's processor all have read the same counters."""
    laps = [
        {"seconds": 2.0, "peak_memory_bytes": 5, "peak_device_memory_bytes": 7, "energy_joules": 1.0},
        {"seconds": 3.0, "peak_memory_bytes": 4, "peak_device_memory_bytes": 8, "energy_joules": 2.0},
    ]
    found = {"seconds": 3.0, "peak_memory_bytes": 5, "peak_device_memory_bytes": 8, "energy_joules": 3.0}
    assert cost.together(laps) == found
    cpu = [lap | {"peak_device_memory_bytes": None} for lap in laps]
    assert cost.together(cpu) == found | {"peak_device_memory_bytes": None, "energy_joules": 2.0}
    assert cost.together([laps[0], laps[1] | {"energy_joules": None}])["energy_joules"] is None


@pytest.mark.parametrize(
    ("before", "after", "joules"),
    [({"a": 5, "b": 1}, {"a": 2_000_005, "b": 1_000_001}, 3.0), ({"a": 5}, {"a": 4}, None), ({}, {}, None)],
    ids=["two counters", "begun again", "none"],
)
def test_energy_between_two_readings(before: dict, after: dict, joules: float | None) -> None:
    assert cost._spent(before, after) == joules


def test_energy_is_read_from_the_packages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("intel-rapl:0", 7), ("intel-rapl:1", 8), ("intel-rapl:0:0", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
    monkeypatch.setattr(cost, "POWERCAP", tmp_path)
    assert Meter("cpu")._joules() == {"intel-rapl:0": 7, "intel-rapl:1": 8}


def test_a_run_says_what_every_stage_has_cost(data: Path, toy_suite: Path, tmp_path: Path) -> None:
    made = RunConfig(suite=str(toy_suite), data=data, order="VQAv2,HQEdit", device="cpu", out=tmp_path, method="ewc")
    results = run(made)
    found = json.loads((made.folder / "cost.json").read_text())
    assert [row["task"] for row in found["stages"]] == ["zero-shot", "VQAv2", "HQEdit"]
    zero, first, second = found["stages"]
    assert zero["tokens_per_second"] is None
    assert zero["train_seconds"] == 0
    for row in (first, second):
        assert row["tokens"] / row["train_seconds"] == pytest.approx(row["tokens_per_second"])
        assert row["peak_memory_bytes"] > 1e8
    assert second["stored_bytes"] == results["cost"]["stored_bytes"] >= first["stored_bytes"] > 312_320 * 4
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
    assert {"kept": "2.5 MB", "peak memory": "1.30 GB", "peak device memory": "3.00 GB"}.items() <= found.items()
    assert found["energy"] == "4.20 kJ"
    (table,) = costs(Run(Path(), {}, {}, {"stages": [{"task": "say", **stage}]}, {})).blocks
    assert "energy" not in table.head, "where no device tells it"


def test_the_whole_is_the_sum_of_its_stages() -> None:
    lap = {"seconds": 2.0, "peak_memory_bytes": 3, "peak_device_memory_bytes": 4, "energy_joules": 5.0}
    ledger = {
        "measured": {"a": added({}, "train", lap), "b": added({}, "train", lap)},
        "trained": {"a": {"steps": 4, "tokens": 10}},
        "stored_by_stage": {"a": 9},
    }
    found = summary(ledger, Meter("cpu"), 1.0)
    assert (found["total_seconds"], found["energy_joules"], found["peak_device_memory_bytes"]) == (4.0, 10.0, 4)
    assert found["stages"][0]["seconds_per_step"] == 0.5
    assert found["stages"][1]["seconds_per_step"] is None
