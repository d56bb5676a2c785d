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
    folder, patch = tmp_path_factory.mktemp("data"), pytest.MonkeyPatch()
    patch.setattr(costs, "SAMPLES", 16)
    patch.setattr(costs, "QUESTIONS", 2)
    patch.setattr(costs, "METHODS", ("lora", "o-lora"))
    with patch.context():
        rows = costs.measure("modalities", (1, 3), 1, folder) + costs.measure("tasks", (1, 2), 1, folder)
    patch.undo()
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
    assert three["kept_bytes"] - one["kept_bytes"] >= 4 * 4 * 8 * widths
    assert three["saved_bytes"] > one["saved_bytes"] > 0
    assert all(row["step_ms"] > 0 and row["answer_ms"] > 0 and row["over_lora"] > 0 for row in measured.values())


def test_what_is_kept_grows_with_tasks_where_each_has_a_branch(measured: dict, widths: int) -> None:
    kept = {name: [measured["tasks", count, name]["kept_bytes"] for count in (1, 2)] for name in ("lora", "o-lora")}
    assert kept["lora"] == [4 * 32 * widths] * 2
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
    file = costs.RESULTS / "cpu.json"
    rows, text = (
        json.loads(file.read_text(encoding="utf-8"))["rows"],
        (ROOT / "docs/costs.md").read_text(encoding="utf-8"),
    )
    for axis, values in costs.AXES.items():
        assert {row["value"] for row in rows if row["axis"] == axis} == set(values)
        assert "\n".join(costs.table(rows, axis)) in text
    costs.draw(file, tmp_path / "figure.svg")
    drawn, shipped = (path.read_text(encoding="utf-8") for path in (tmp_path / "figure.svg", costs.FIGURE))
    assert all(f">{name}<" in text for name in costs.METHODS for text in (drawn, shipped))


def test_a_suite_of_unknown_axes_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        costs.main(["--axes", "width"])
    assert "invalid choice: 'width'" in capsys.readouterr().err
