"""Answers that were correct when their task was learnt and are wrong at the end, and how many fail by format alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import fsum

from cnext.analysis.groups import RunGroups, means
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.runs.schemas import Answer
from cnext.scoring.answers import contains_words
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.boxes import iou, parse_box

RIGHT = 50.0
"""The least score of a correct answer."""
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
NO_PREDICTIONS = "the answers in predictions/ are needed and missing; copy the whole run folder, or run it again"


@dataclass(frozen=True)
class History:
    """The answers to one sample, from the stage that learns its task to the last."""

    task: str
    learnt: int
    stages: dict[int, Answer]

    @cached_property
    def then(self) -> Answer:
        return self.stages[self.learnt]

    @cached_property
    def now(self) -> Answer:
        return self.stages[max(self.stages)]

    @property
    def correct(self) -> bool:
        """Correct when learnt."""
        return self.then.strict >= RIGHT

    @property
    def broken(self) -> bool:
        """Correct when learnt, and at the end with less than half of that score."""
        return self.correct and self.falls(self.now)

    def falls(self, row: Answer) -> bool:
        return row.strict < self.then.strict / 2

    @property
    def since(self) -> int:
        """The first stage at which a broken answer was wrong; later ones may be correct."""
        return next(stage for stage, row in self.stages.items() if stage > self.learnt and self.falls(row))

    @property
    def drop(self) -> float:
        return self.then.strict - self.now.strict

    @property
    def lenient(self) -> bool:
        """A text that the paper profile scores as correct, other than the empty one."""
        return bool(self.now.answer and self.now.text.strip()) and self.now.paper >= RIGHT

    @property
    def fixed(self) -> bool:
        """Correct if errors of format are ignored."""
        return bool(self.now.answer) and right_but_for_format(self.now.text, self.now.answer)


def right_but_for_format(text: str, expected: str) -> bool:
    """Whether a wrong answer is correct if its format is ignored.

    Text: the expected words occur whole and in sequence, whatever is around them.  A box: four numbers in sequence, in
    any brackets and with corners in any order, form a box with an IoU of at least 0.5.
    """
    box = parse_box(expected)
    if box is None:
        return contains_words(text, expected)
    numbers = [float(number) for number in NUMBER.findall(text)]
    quads = (numbers[i : i + 4] for i in range(len(numbers) - 3))
    return any(iou((min(a, c), min(b, d), max(a, c), max(b, d)), box) >= 0.5 for a, b, c, d in quads)


def answers(run: Run) -> dict[str, list[History]]:
    """The samples of each task learnt before the last stage, in their order.

    Raises:
        Unavailable: the folder has no predictions of a task at the stage that learns it, or at the end.
    """
    if not in_turn(run):
        raise Unavailable(f"{run.path}: expected tasks that are learnt one after another")
    found = {}
    for number, task in enumerate(run.tasks[: run.last - 1], 1):
        rows = run.answers(task)
        if not rows or not {number, run.last} <= rows[0].keys():
            raise Unavailable(f"{run.path}: {NO_PREDICTIONS} ({task}, stages {number} and {run.last})")
        found[task] = [
            History(task, number, {stage: row for stage, row in stages.items() if number <= stage <= run.last})
            for stages in rows
        ]
    return found


def shares(of: list[History]) -> dict[str, float]:
    """Shares of one task's answers in percent; the last three in points of its score."""
    broken = [answer for answer in of if answer.broken]
    parts = {
        "correct when learnt": [answer.correct for answer in of],
        "broken": [answer.broken for answer in of],
        **{
            short: [a.now.error == kind for a in broken]
            for short, kind in zip(("HAL", "IUF", "OTH"), ERROR_TYPES, strict=True)
        },
        "lenient": [answer.lenient for answer in broken],
        "fixed": [answer.fixed for answer in broken],
        "format only": [answer.lenient or answer.fixed for answer in broken],
        "lost": [max(0.0, answer.drop) / 100 for answer in of],
        "gained": [max(0.0, -answer.drop) / 100 for answer in of],
        "forgetting": [answer.drop / 100 for answer in of],
    }
    return {name: 100 * fsum(values) / len(of) for name, values in parts.items()}


def breaks(study: RunGroups) -> list[ResultTable]:
    """Shares of broken answers, over all tasks but the last and by task; for one run also every broken answer."""
    groups = [group for group in study.groups if in_turn(group.runs[0])]
    if not groups:
        raise Unavailable("expected tasks that are learnt one after another; broken answers are those forgotten since")
    overall: list[list[Cell]] = []
    by_task: list[list[Cell]] = []
    for group in groups:
        by_run = [{task: shares(of) for task, of in answers(run).items()} for run in group.runs]
        columns = list(next(iter(by_run[0].values())))
        over = [[fsum(of[name] for of in run.values()) / len(run) for name in columns] for run in by_run]
        overall.append([group.method, group.order, *means(over)])
        for task in by_run[0]:
            by_task.append([group.method, group.order, task, *means([run[task].values() for run in by_run])])
    definition = f"Mean over all tasks but the last. {DEFINITION}"
    found = [
        ResultTable("breaks", "Broken answers", definition, ["method", "order", *columns], overall, 2, decimals=1),
        ResultTable(
            "breaks.tasks", "By task", DEFINITION, ["method", "order", "task", *columns], by_task, 3, decimals=1
        ),
    ]
    return [*found, broken(study.single)] if study.single else found


DEFINITION = (
    "In percent of a task's test samples. Correct when learnt: with a score of 50 or more then. Broken: of these, with "
    "less than half of that score at the end; HAL, IUF and OTH are the broken by type of error (hallucination, "
    "instruction unfollowing, other). Lenient: broken, but still right for the paper's own, more lenient scorers. "
    "Fixed: broken, but the expected words or box are in the answer. Format only: lenient or fixed. In points: lost "
    "and gained, all falls and all rises of samples, whose difference is the task's forgetting."
)


def broken(run: Run) -> ResultTable:
    """Every broken answer of a run."""
    rows: list[list[Cell]] = []
    for of in answers(run).values():
        for answer in (answer for answer in of if answer.broken):
            then, now = answer.then, answer.now
            only = " + ".join(name for name in ("lenient", "fixed") if getattr(answer, name))
            texts = [row.text or ("an image" if row.image else "") for row in (then, now)]
            asked = [answer.task, now.id, now.instruction, now.answer]
            rows.append([*asked, *texts, run.stage(answer.since), now.error.replace("_", " "), only])
    head = [
        "task",
        "sample",
        "prompt",
        "expected",
        "when learnt",
        "at the end",
        "first wrong at",
        "error",
        "format only",
    ]
    definition = (
        "Every answer that was correct when learnt and is broken at the end, with both answers and the error type."
    )
    return ResultTable("breaks.prompts", "Broken answers by prompt", definition, head, rows, words=len(head))
