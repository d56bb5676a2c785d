"""Estimates from a part of the errors against the labels of all of them, over many draws."""

from __future__ import annotations

import random
from math import fsum

import pytest

from cnext.judging.cases import Case
from cnext.judging.cells import Cell, JudgedRun
from cnext.judging.estimates import AVERAGES, estimates
from cnext.judging.statistics import stratified
from cnext.scoring.base import ERROR_TYPES

HAL, IUF, OTH = ERROR_TYPES
TASKS = ["say", "draw", "name"]


def small_run(seed: int) -> tuple[JudgedRun, dict[Case, str]]:
    """A run of three tasks whose errors lose unequally, and what a judge would say of every one."""
    draw = random.Random(seed)
    cells, truth = [], {}
    for stage in (1, 2, 3):
        for number, task in enumerate(TASKS[:stage]):
            errors: dict[Case, float] = {}
            for index in range(60 + 20 * stage):
                ruled = draw.random() < 0.2
                asked = ("text", "", "", "")
                case = Case(stage, task, index, f"{seed}", *asked, None, None, None, IUF if ruled else HAL)
                errors[case] = draw.uniform(20, 100) if task == "draw" else 100.0
                weights = (5, stage, 1 + number)
                truth[case] = IUF if ruled else draw.choices((HAL, IUF, OTH), weights)[0]
            cells.append(Cell(stage, TASKS[stage - 1], task, 200, 100 - fsum(errors.values()) / 200, errors))
    return JudgedRun(TASKS, cells), truth


def averages(run: JudgedRun, labels: dict[Case, str]) -> dict[str, float]:
    """The averages by their definition, where all is judged."""
    share = {
        (cell.stage, cell.task, kind): fsum(lost for case, lost in cell.errors.items() if labels[case] == kind) / 200
        for cell in run.cells
        for kind in ERROR_TYPES
    }
    learnt = list(enumerate(TASKS[:2], 1))
    return {
        name: fsum(share[3, task, kind] - share[stage, task, kind] for stage, task in learnt) / 2
        for name, kind in AVERAGES.items()
    }


def part(run: JudgedRun, truth: dict[Case, str], limit: int) -> dict[Case, str]:
    """The labels of the errors that rules decide, and of those that are drawn."""
    cases = [case for cell in run.decisive() for case in cell.errors]
    chosen = stratified([case for case in cases if not case.decided], limit)
    return {case: truth[case] for case in [*chosen, *(case for case in cases if case.decided)]}


def test_all_judged_is_no_estimate() -> None:
    run, truth = small_run(0)
    found = estimates(run, truth)
    assert found is not None
    for name, value in averages(run, truth).items():
        assert [found[name][end] for end in ("estimate", "low", "high")] == pytest.approx([value] * 3)


@pytest.mark.parametrize("limit", [40, 150])
def test_intervals_hold_the_truth(limit: int) -> None:
    """In 95 of 100 cases and more: stages share their samples, which intervals of independent parts leave out."""
    held, width, count = 0, 0.0, 60
    for seed in range(count):
        run, truth = small_run(seed)
        found, known = estimates(run, part(run, truth, limit)), averages(run, truth)
        assert found is not None
        total = fsum(of["estimate"] for of in found.values())
        assert total == pytest.approx(fsum(known.values()), abs=1e-9), "Forgetting, whoever judges"
        held += sum(found[name]["low"] <= known[name] <= found[name]["high"] for name in AVERAGES)
        width += fsum(of["high"] - of["low"] for of in found.values()) / 3 / count
    assert held >= 0.93 * 3 * count
    assert width < {40: 30, 150: 13}[limit]


def test_nothing_is_estimated_of_nothing() -> None:
    run, truth = small_run(1)
    assert estimates(run, part(run, truth, 3)) is None, "six cells, of which three have a verdict"
    assert estimates(JudgedRun(TASKS, run.cells[:1]), truth) is None, "nothing can be forgotten after one stage"
