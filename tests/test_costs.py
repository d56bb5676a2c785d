"""The cost program: what it counts, its tasks, and the figures in the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import costs
import pytest

from cnext.backbones.small.model import SmallBackbone
from cnext.methods.parts.branches import total_width
from cnext.tasks import formats
from cnext.tasks.next_real import material

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], dict]:
    """Few steps of few cases, whose times say nothing."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "SAMPLES", 16)
        patch.setattr(costs, "QUESTIONS", 2)
        patch.setattr(costs, "METHODS", ("lora", "ewc", "o-lora"))
        rows = costs.measure("modalities", (1, 3), 1, folder) + costs.measure("tasks", (1, 2), 1, folder)
    return {(row["axis"], row["value"], row["method"]): row for row in rows}


@pytest.fixture(scope="module")
def widths() -> int:
    """Parameters of a branch for each of its ranks."""
    backbone = SmallBackbone.load()
    return total_width(backbone.language_model, backbone.targets)


def test_branches_and_bytes_grow_with_modalities(measured: dict, widths: int) -> None:
    """Two per modality; mage-paper keeps all, and trains those of what the task reads and writes."""
    one, three = (measured["modalities", count, "mage-paper"] for count in (1, 3))
    assert (one["branches"], three["branches"]) == (2, 6)
    assert (one["trained"], three["trained"]) == (2 * 8 * widths, 4 * 8 * widths)
    assert three["saved_bytes"] > one["saved_bytes"] > 0
    assert all(row["step_ms"] > 0 and row["answer_ms"] > 0 and row["over_lora"] > 0 for row in measured.values())


def test_what_is_kept_grows_with_tasks_where_each_has_a_branch(measured: dict, widths: int) -> None:
    """Of tasks that are done, not what training holds: of ewc the Fisher information beside the parameters."""
    methods = ("lora", "ewc", "o-lora")
    kept = {name: [measured["tasks", count, name]["kept_bytes"] for count in (1, 2)] for name in methods}
    assert kept["lora"] == [4 * 32 * widths] * 2
    assert kept["ewc"][0] == kept["ewc"][1] == pytest.approx(2 * 4 * 32 * widths, abs=32)  # and two counters
    assert kept["o-lora"][1] - kept["o-lora"][0] == 4 * 32 * widths


def test_parts_share_no_class(tmp_path: Path) -> None:
    costs.cut(24).write(tmp_path / "data", 12, 4)
    found = [
        {sample.turns[0].answer for sample in formats.read_samples(task, tmp_path / "data", "train")}
        for task in costs.tasks_of(24, ("text", "image"))
    ]
    for part, answers in enumerate(found):
        assert answers <= set(material.things()[part::24])


def test_the_documentation_says_what_was_measured(tmp_path: Path) -> None:
    file, text = costs.RESULTS / "cpu.json", (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for axis, values in costs.AXES.items():
        assert {row["value"] for row in rows if row["axis"] == axis} == set(values)
        assert "\n".join(costs.table(rows, axis)) in text
    costs.draw(file, tmp_path / "figure.svg")
    for figure in (tmp_path / "figure.svg", costs.FIGURE):
        drawn = figure.read_text(encoding="utf-8")
        assert all(f">{name}<" in drawn for name in costs.METHODS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--axes", "width"], "invalid choice: 'width'"),
        (["--modalities", "2", "4"], "--modalities: expected numbers from 1 to 3, got 4"),
        (["--tasks", "0", "101"], "--tasks: expected numbers from 1 to 100, got 0, 101"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        costs.main(given)
    assert said in capsys.readouterr().err
