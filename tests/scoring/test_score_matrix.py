"""The score matrix and its metrics, against the paper's tables and by hand."""

import json
import math
import random

import pytest

from cnext.errors import UserError
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS, REFERENCE_FORMULAS, ScoreMatrix, metrics, points, reference_metrics


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
            "forgetting_peak": 15,
            "bwt": -15,
            "fwt": -2.5,
            "transfer": None,
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


def test_the_peak_may_be_at_the_end_or_before_it() -> None:
    result = metrics(ScoreMatrix.from_rows([[40, None, None], [90, 50, None], [70, 60, 10]]))
    assert result["forgetting_max"] == pytest.approx((20 - 10) / 2)
    assert result["forgetting_peak"] == pytest.approx((20 + 0) / 2)
    assert result["forgetting"] == pytest.approx((-30 - 10) / 2)


def test_transfer_is_a_mean_over_tasks_of_means_over_stages() -> None:
    matrix = ScoreMatrix.from_rows([[80, 10, 20, 0], [70, 60, 40, 3], [60, 50, 90, 7], [50, 40, 80, 70]])
    assert metrics(matrix)["transfer"] == pytest.approx((10 + (20 + 40) / 2 + (0 + 3 + 7) / 3) / 3)


def test_forgetting_of_each_stage() -> None:
    matrix = ScoreMatrix.from_rows([[80, None, None], [70.5, 60, None], [50, 40.5, 70]])
    first, *others = matrix.stage_forgetting()
    assert math.isnan(first)
    assert others == pytest.approx([9.5, (30 + 19.5) / 2])
    matrix = ScoreMatrix.from_rows([[80, None, None], [None, 60, None], [50, 40.5, 70]])
    _, gap, last = matrix.stage_forgetting()
    assert math.isnan(gap)
    assert last == pytest.approx((30 + 19.5) / 2)


def test_forward_transfer_takes_scores_before_learnt_and_is_never_zero_without_them() -> None:
    matrix = ScoreMatrix.from_rows([[80, None, None], [70, 60, None], [50, 40, 70]])
    zero_shot = [50, 10, 20]
    assert metrics(matrix, zero_shot, before_learnt=[None, 15, 18])["fwt"] == pytest.approx((5 - 2) / 2)
    for lacking in (None, [None, None, None], [None, 15, None]):
        assert metrics(matrix, zero_shot, before_learnt=lacking)["fwt"] is None
    assert metrics(matrix, [50, 10, None], before_learnt=[None, 15, 18])["fwt"] is None
    assert metrics(matrix, before_learnt=[None, 15, 18])["fwt"] is None


def test_metrics_against_other_scores_by_hand() -> None:
    matrix = ScoreMatrix.from_rows([[80, 15], [50, 60]])
    result = reference_metrics(
        matrix, joint=[90, 40], single=[70, 50], chance=[40, 10], held_out=([30, 40, 50], [20, 45, 40])
    )
    assert result == pytest.approx(
        {
            "fwt_chance": 15 - 10,
            "forgetting_relative": 100 * 30 / 40,
            "transfer_relative": (100 * 10 / 30 + 100 * 10 / 40) / 2,
            "intransigence": ((90 - 80) + (40 - 60)) / 2,
            "omega": (80 / 90 + 55 / 65) / 2,
            "zero_shot_retention": (-10 + 5 - 10) / 3,
        }
    )


@pytest.mark.parametrize(
    ("given", "undefined"),
    [
        ({"chance": [80, 0]}, {"forgetting_relative"}),
        ({"chance": [0, 50], "single": [90, 50]}, {"transfer_relative"}),
        ({"joint": [0, 0]}, {"omega"}),
        ({}, set()),
    ],
    ids=["learnt no better than chance", "alone no better than chance", "joint training at zero", "nothing given"],
)
def test_a_metric_without_a_positive_divisor_is_undefined(given: dict, undefined: set) -> None:
    usual = {"chance": [0, 0], "single": [90, 50], "joint": [90, 50]}
    matrix = ScoreMatrix.from_rows([[80, 15], [50, 60]])
    result = reference_metrics(matrix, **(usual | given))
    assert {name for name, value in result.items() if value is None} == undefined | {"zero_shot_retention"}
    assert set(reference_metrics(matrix).values()) == {None}


@pytest.mark.parametrize(
    ("rows", "defined"),
    [
        (
            [[60, None, None], [None, 50, None], [40, 30, 20]],
            {"avg_acc", "new_acc", "forgetting", "bwt", "worst_acc", "worst_forgetting"},
        ),
        ([[None, None, None], [None, None, None], [40, 30, 20]], {"avg_acc", "worst_acc"}),
        ([[60, None, None], [50, None, None], [40, 30, 20]], {"avg_acc", "worst_acc"}),
    ],
    ids=["diagonal and last row", "last row", "a task not scored when learnt"],
)
def test_what_gaps_leave_is_exact_and_the_rest_is_undefined(rows: list, defined: set) -> None:
    whole = ScoreMatrix.from_rows([[60, None, None], [70, 50, None], [40, 30, 20]])
    result = metrics(ScoreMatrix.from_rows(rows))
    assert {name for name, value in result.items() if value is not None} == defined
    assert {name: result[name] for name in defined} == {name: metrics(whole)[name] for name in defined}


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
    lost = 100 - matrix[2, 0]
    said = rf"task 1 after stage 3 to add up to 100 minus its score, {lost:.6f}, got {lost + 1e-3:.6f}; compute"
    with pytest.raises(UserError, match=said):
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


def test_a_last_stage_with_a_gap_is_not_done() -> None:
    rows = random_matrix(4, 0).to_rows()
    rows[3][0] = None
    assert ScoreMatrix.from_rows(rows).stages_done == 3
    assert metrics(ScoreMatrix.from_rows(rows)) == metrics(ScoreMatrix.from_rows(rows[:3]))


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
    assert len(ScoreMatrix.from_rows([])) == 0


def test_every_metric_has_a_formula_of_one_line() -> None:
    assert list(metrics(random_matrix(3, 0))) == list(FORMULAS)
    assert list(reference_metrics(random_matrix(3, 0))) == list(REFERENCE_FORMULAS)
    assert all("divisor" in text and "\n" not in text for text in (FORMULAS | REFERENCE_FORMULAS).values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (49.575, "+49.58"),
        (297.45 / 6, "+49.58"),
        (-0.125, "-0.13"),
        (58.978333, "+58.98"),
        (-0.001, "+0.00"),
        (0, "+0.00"),
    ],
    ids=str,
)
def test_figures_are_rounded_as_in_print(value: float, text: str) -> None:
    assert points(value, "+") == text
    assert points(value) == text.removeprefix("+")


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
