"""The score matrix and its metrics, against the paper's tables and by hand."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cnext.errors import UserError
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS, ScoreMatrix, metrics

PAPER = json.loads((Path(__file__).parent / "paper_tables.json").read_text())
METHODS = PAPER["methods"]


def random_matrix(size: int, seed: int) -> ScoreMatrix:
    draw = random.Random(seed)
    return ScoreMatrix.from_rows([[draw.uniform(0, 100) if i <= t else None for i in range(size)] for t in range(size)])


def random_errors(matrix: ScoreMatrix, seed: int) -> dict[str, ScoreMatrix]:
    draw = random.Random(seed)
    errors = {kind: ScoreMatrix(len(matrix)) for kind in ERROR_TYPES}
    for t in range(len(matrix)):
        for i in range(t + 1):
            left = 100 - matrix[t, i]
            cut = sorted(draw.uniform(0, left) for _ in range(2))
            for kind, share in zip(ERROR_TYPES, (cut[0], cut[1] - cut[0], left - cut[1]), strict=True):
                errors[kind].set(t, i, share)
    return errors


@pytest.mark.parametrize("method", METHODS)
def test_the_paper_tables_are_reproduced(method: str) -> None:
    printed = METHODS[method]
    matrix = ScoreMatrix.from_rows(printed["rows"])
    result = metrics(matrix)
    for name in ("avg_acc", "forgetting", "new_acc"):
        assert result[name] == pytest.approx(printed[name], abs=0.01), name
    assert matrix.stage_averages() == pytest.approx(printed["stage_averages"], abs=0.01)


@pytest.mark.parametrize(
    ("method", "forgetting_max", "maa"),
    [
        ("LoRA", 23.09, 47.01),
        ("MoELoRA", 19.93, 50.92),
        ("EWC", 19.30, 53.15),
        ("LAE", 18.72, 52.84),
        ("PGP", 14.70, 52.65),
        ("CIA", 17.01, 52.66),
        ("RegLoRA", 16.64, 52.17),
        ("MAGE", 14.41, 53.42),
    ],
)
def test_forms_that_the_paper_does_not_print(method: str, forgetting_max: float, maa: float) -> None:
    result = metrics(ScoreMatrix.from_rows(METHODS[method]["rows"]))
    assert result["forgetting_max"] == pytest.approx(forgetting_max, abs=0.006)
    assert result["maa"] == pytest.approx(maa, abs=0.006)


def test_table_5_by_output_modality() -> None:
    result = metrics(ScoreMatrix.from_rows(METHODS["MAGE"]["rows"]), writes=PAPER["writes"])
    assert result["avg_acc_text"] == pytest.approx(43.71, abs=0.006)
    assert result["avg_acc_image"] == pytest.approx(61.32, abs=0.006)


@pytest.mark.parametrize("method", PAPER["errors"])
def test_table_2_adds_up_to_forgetting(method: str) -> None:
    assert sum(PAPER["errors"][method].values()) == pytest.approx(METHODS[method]["forgetting"], abs=0.006)


def test_every_metric_by_hand() -> None:
    matrix = ScoreMatrix.from_rows([[80, 15, None], [50, 60, 30], [70, 40, 90]])
    writes = [("text",), ("image",), ("text",)]
    errors = {
        "hallucination": ScoreMatrix.from_rows([[10, None, None], [None, 40, None], [20, 30, None]]),
        "instruction_unfollowing": ScoreMatrix.from_rows([[10, None, None], [None, 0, None], [5, 25, None]]),
        "other": ScoreMatrix.from_rows([[0, None, None], [None, 0, None], [5, 5, None]]),
    }
    assert metrics(matrix, [20, 10, 40], errors, writes) == pytest.approx(
        {
            "avg_acc": 200 / 3,
            "new_acc": 230 / 3,
            "maa": (80 + 55 + 200 / 3) / 3,
            "forgetting": 15,
            "forgetting_max": 15,
            "bwt": -15,
            "fwt": -2.5,
            "worst_acc": 40,
            "worst_forgetting": 20,
            "recovery": 20,
            "avg_acc_text": 80,
            "avg_acc_image": 40,
            "forgetting_text": 10,
            "forgetting_image": 20,
            "forgetting_intermodal": 25,
            "forgetting_intramodal": -20,
            "avg_hal": 0,
            "avg_iuf": 10,
            "avg_oth": 5,
        }
    )


def test_cells_above_the_diagonal_change_forward_transfer_alone() -> None:
    rows = random_matrix(4, 0).to_rows()
    for t in range(3):
        rows[t][t + 1] = 99.0
    with_ahead = metrics(ScoreMatrix.from_rows(rows), zero_shot=[0.0] * 4)
    without = metrics(random_matrix(4, 0), zero_shot=[0.0] * 4)
    assert with_ahead.pop("fwt") == pytest.approx(99)
    assert without.pop("fwt") is None
    assert with_ahead == without


@pytest.mark.parametrize("size", [2, 3, 6])
def test_identities_hold_on_random_matrices(size: int) -> None:
    for seed in range(20):
        matrix = random_matrix(size, seed)
        result = metrics(matrix, error_matrices=random_errors(matrix, seed))
        assert result["forgetting"] == pytest.approx(size / (size - 1) * (result["new_acc"] - result["avg_acc"]))
        assert result["avg_hal"] + result["avg_iuf"] + result["avg_oth"] == pytest.approx(result["forgetting"])
        assert result["forgetting_max"] >= result["forgetting"] - 1e-9
        assert result["bwt"] == pytest.approx(-result["forgetting"])


def test_error_shares_of_other_answers_are_refused() -> None:
    matrix = random_matrix(3, 0)
    errors = random_errors(matrix, 0)
    errors["other"].set(2, 0, errors["other"][2, 0] + 1e-3)
    with pytest.raises(UserError, match="task 1 after stage 3"):
        metrics(matrix, error_matrices=errors)


def test_missing_error_shares_give_none() -> None:
    matrix = random_matrix(3, 0)
    result = metrics(matrix, error_matrices={kind: ScoreMatrix(3) for kind in ERROR_TYPES})
    assert (result["avg_hal"], result["avg_iuf"], result["avg_oth"]) == (None, None, None)


@pytest.mark.parametrize("done", [1, 2, 4])
def test_an_unfinished_run_has_the_metrics_of_its_stages(done: int) -> None:
    rows = random_matrix(6, 3).to_rows()
    unfinished = ScoreMatrix.from_rows(rows[:done])
    assert len(unfinished) == 6
    assert unfinished.stages_done == done
    assert metrics(unfinished) == metrics(ScoreMatrix.from_rows([row[:done] for row in rows[:done]]))


def test_a_stage_with_a_gap_is_not_done() -> None:
    rows = random_matrix(4, 0).to_rows()
    rows[2][0] = None
    assert ScoreMatrix.from_rows(rows).stages_done == 2


def test_one_task_has_no_forgetting() -> None:
    matrix = ScoreMatrix.from_rows([[60.0]])
    result = metrics(matrix, [10.0], {kind: ScoreMatrix(1) for kind in ERROR_TYPES}, [("text",)])
    defined = {name: value for name, value in result.items() if value is not None}
    assert defined == {
        "avg_acc": 60, "new_acc": 60, "maa": 60, "worst_acc": 60, "recovery": 0, "avg_acc_text": 60
    }  # fmt: skip


def test_nothing_evaluated_leaves_everything_undefined() -> None:
    assert set(metrics(ScoreMatrix(3)).values()) == {None}
    assert set(metrics(ScoreMatrix.from_rows([])).values()) == {None}


def test_every_metric_has_a_formula_of_one_line() -> None:
    assert list(metrics(random_matrix(3, 0))) == list(FORMULAS)
    assert all(formula and "\n" not in formula for formula in FORMULAS.values())


def test_json_round_trip() -> None:
    matrix = random_matrix(5, 1)
    again = ScoreMatrix.from_rows(json.loads(json.dumps(matrix.to_rows())))
    assert again == matrix
    assert again != random_matrix(5, 2)
    assert math.isnan(again[0, 1])


@pytest.mark.parametrize(
    "rows",
    [[[1.0], [2.0]], [[1.0, None], [2.0]], [[math.nan]], [[math.inf]], [["1"]], [[True]]],
    ids=["too many", "ragged", "nan", "inf", "string", "bool"],
)
def test_malformed_rows_are_refused(rows: list) -> None:
    with pytest.raises(UserError, match="expected a"):
        ScoreMatrix.from_rows(rows)


@pytest.mark.parametrize("cell", [(3, 0), (0, 3), (-1, 0)], ids=str)
def test_cells_outside_are_refused(cell: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="3 tasks"):
        ScoreMatrix(3).set(*cell, 1.0)


def test_metrics_and_scorers_import_nothing_heavy() -> None:
    code = (
        "import sys, cnext.scoring, cnext.scoring.matrix;"
        "sys.exit(', '.join({'torch', 'numpy', 'open_clip', 'PIL'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
