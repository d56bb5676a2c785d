"""The analysis of a benchmark's validity against runs written by hand, and its section of a study's page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from analysis import small_runs
from analysis.small_runs import TASKS, write
from training.toy import change

from cnext.analysis import analyze
from cnext.analysis.groups import RunGroups
from cnext.analysis.result import ResultTable
from cnext.cli import main
from cnext.errors import UserError
from cnext.report import write_reports
from cnext.tables import aggregate
from cnext.tables.aggregate import Summary

SEPARABILITY = {
    "tasks": list(TASKS), "split": "test", "centroids": [4, 4, 4],
    "question": {"accuracy": 75.0, "confusion": [[4, 0, 0], [0, 3, 1], [1, 1, 2]]},
    "image_and_question": {"accuracy": 100.0, "confusion": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]},
}  # fmt: skip


def measured(seed: int = 0, fwt: float = 1.5, kept: Any = (50.0, 40.0, None, 44.0), **more: Any) -> dict[str, Any]:
    metrics = small_runs.results()["metrics"] | {"fwt": fwt}
    held_out = {"tasks": ["skills"], "scores": [[score] for score in kept], "before": [kept[0]], "after": [kept[-1]]}
    return {"seed": seed, "metrics": metrics, "held_out": held_out, **more}


def tables(folder: Path) -> dict[str, ResultTable]:
    study = RunGroups.read(aggregate.find([folder]))
    return {result.name: result for result in analyze(study, ["validity"]).results}


def text(cell: Any) -> Any:
    return (cell.n, cell.mean) if isinstance(cell, Summary) else cell


def rows(result: ResultTable) -> list[list[Any]]:
    return [[text(cell) for cell in row] for row in result.rows]


def test_figures_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "0", **measured())
    write(tmp_path / "1", **measured(1, 2.5, (50.0, 42.0, None, 46.0)))
    (tmp_path / "1" / "separability.json").write_text(json.dumps(SEPARABILITY))
    found = tables(tmp_path)
    assert rows(found["validity.separability"]) == [
        ["the question", 12, 75.0, 100 / 3],
        ["image and question", 12, 100.0, 100 / 3],
    ]
    assert rows(found["validity.confusion"])[1] == ["the question", "draw", 0, 3, 1]
    assert rows(found["validity.fwt"]) == [["lora", "paper", (2, 2.0)]]
    assert rows(found["validity.general"]) == [["lora", "paper", "skills", (2, 50.0), (2, 45.0), (2, -5.0)]]
    stages = [["lora", "paper", "skills", (2, 50.0), (2, 41.0), "not measured", (2, 45.0)]]
    assert rows(found["validity.general.stages"]) == stages
    assert [row[0] for row in rows(found["validity.routers"])] == ["prototype", "mr-lora"]


def test_what_was_not_measured_is_no_zero(tmp_path: Path) -> None:
    """Of runs of an earlier version; and a mean over seeds needs all of them."""
    write(tmp_path / "old" / "0")
    write(tmp_path / "new" / "0", method="new", **measured())
    write(tmp_path / "new" / "1", method="new", seed=1)
    found = tables(tmp_path)
    for name in ("validity.fwt", "validity.general"):
        assert {tuple(row[-1:]) for row in rows(found[name])} == {("not measured",)}
    assert [row[1:] for row in rows(found["validity.separability"])] == [[None, "not measured", None]] * 2
    assert "validity.confusion" not in found


def test_joint_and_untrained_methods_have_no_forward_transfer(tmp_path: Path) -> None:
    joint = ((None,) * 3, (None,) * 3, (50.0, 60.0, 70.0))
    write(tmp_path / "joint", method="upper", matrix=joint, joint=True)
    write(tmp_path / "none", method="none", cost={"optimizer_steps": 0})
    found = tables(tmp_path)
    assert {row[-1] for row in rows(found["validity.fwt"])} == {"not applicable"}


@pytest.mark.parametrize("count", [2, 3])
def test_the_range_needs_three_orders(count: int, tmp_path: Path) -> None:
    matrices = [small_runs.MATRIX, ((70.0, None, None), (60.0, 50.0, None), (20.0, 60.0, 30.0)), small_runs.MATRIX]
    orders = [TASKS, TASKS[::-1], (TASKS[1], TASKS[0], TASKS[2])]
    for number in range(count):
        given = {"order": f"order {number}", "tasks": orders[number], "matrix": matrices[number]}
        write(tmp_path / str(number), **given)
    found = rows(tables(tmp_path)["validity.orders"])
    if count == 2:
        assert {(row[2], row[3]) for row in found} == {(2, "needs three orders")}
        return
    means = [sum(matrix[2]) / 3 for matrix in matrices]
    drops = [((m[0][0] - m[2][0]) + (m[1][1] - m[2][1])) / 2 for m in matrices]
    assert found == [
        ["lora", "Avg.ACC", 3, pytest.approx(min(means)), "order 1", pytest.approx(max(means)), "order 0"],
        ["lora", "Forgetting", 3, pytest.approx(min(drops)), "order 0", pytest.approx(max(drops)), "order 1"],
    ]


def test_every_study_page_says_what_its_figures_stand_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "runs" / "0", method="old")
    write(tmp_path / "runs" / "1", **measured())
    [page] = [path for path in write_reports([tmp_path / "runs"]) if path.name == "study.html"]
    shown = page.read_text(encoding="utf-8")
    assert "Benchmark validity" in shown
    assert "Range over orders: needs three orders." in shown
    assert "Separability of the tasks: not measured." in shown
    assert "Forward transfer: " not in shown
    assert "not measured</td>" in shown, "of the method of an earlier version"
    assert main(["analyze", str(tmp_path / "runs"), "--what", "validity", "--format", "csv"]) == 0
    assert re.search("validity.fwt,old,paper,.*not measured", capsys.readouterr().out)


def test_a_damaged_separability_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "0")
    file = tmp_path / "0" / "separability.json"
    file.write_text(json.dumps(SEPARABILITY))
    change(file, centroids=[4, 4])
    with pytest.raises(UserError, match=r"separability.json: Expected centroids and confusions of 3 tasks"):
        tables(tmp_path)
