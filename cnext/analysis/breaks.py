"""Which prompts broke and how: answers right when learnt and wrong at the end, and forgetting of format alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import fsum

from cnext.analysis.finding import Cell, Finding, Unavailable
from cnext.analysis.groups import Study, means
from cnext.analysis.run import Run
from cnext.analysis.transfer import in_turn
from cnext.runs.schemas import Answer
from cnext.scoring.answers import contains_words
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.boxes import iou, parse_box

RIGHT = 50.0
"""An answer of at least this score is right; a wrong or a broken one has less than half of what it had when right."""
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
NO_PREDICTIONS = "this needs what was answered, and predictions/ is not there; take the whole run folder, or run again"


@dataclass(frozen=True)
class History:
    """One sample: what was answered when its task was learnt and at the end, and at all stages between."""

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
    def held(self) -> bool:
        """Right when learnt."""
        return self.then.strict >= RIGHT

    @property
    def broken(self) -> bool:
        """Right when learnt, and at the end with less than half of that score."""
        return self.held and self.falls(self.now)

    def falls(self, row: Answer) -> bool:
        return row.strict < self.then.strict / 2

    @property
    def since(self) -> int:
        """The stage at which a broken answer first broke. It may have come back in between."""
        return next(stage for stage, row in self.stages.items() if stage > self.learnt and self.falls(row))

    @property
    def drop(self) -> float:
        return self.then.strict - self.now.strict

    @property
    def lenient(self) -> bool:
        """Words that the paper profile still holds right; an empty answer, which it does too, is none."""
        return bool(self.now.answer and self.now.text.strip()) and self.now.paper >= RIGHT

    @property
    def mended(self) -> bool:
        """Right once errors of format are taken away."""
        return bool(self.now.answer) and right_but_for_format(self.now.text, self.now.answer)


def right_but_for_format(text: str, expected: str) -> bool:
    """Whether a wrong answer holds the right one, under what is only of form.

    Words: the expected ones stand whole and in a row in the text, whatever is around them, said once or many times,
    with a picture or without.  A box: four numbers in a row of the text, in any brackets, corners in any order, make a
    box with an IoU of at least 0.5.
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
        raise Unavailable(f"{run.path}: nothing can break where tasks are not learnt one after another")
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
    """What became of one task's answers, in percent of them; the last three in points of its score."""
    broken = [answer for answer in of if answer.broken]
    parts = {
        "right when learnt": [answer.held for answer in of],
        "broken": [answer.broken for answer in of],
        **{
            short: [a.now.error == kind for a in broken]
            for short, kind in zip(("HAL", "IUF", "OTH"), ERROR_TYPES, strict=True)
        },
        "lenient": [answer.lenient for answer in broken],
        "mended": [answer.mended for answer in broken],
        "format only": [answer.lenient or answer.mended for answer in broken],
        "lost": [max(0.0, answer.drop) / 100 for answer in of],
        "gained": [max(0.0, -answer.drop) / 100 for answer in of],
        "forgetting": [answer.drop / 100 for answer in of],
    }
    return {name: 100 * fsum(values) / len(of) for name, values in parts.items()}


def breaks(study: Study) -> list[Finding]:
    """What became of the answers, over all tasks but the last and of each; of one run also every broken one."""
    groups = [group for group in study.groups if in_turn(group.runs[0])]
    if not groups:
        raise Unavailable("nothing can break where tasks are not learnt one after another")
    overall: list[list[Cell]] = []
    by_task: list[list[Cell]] = []
    for group in groups:
        read = [{task: shares(of) for task, of in answers(run).items()} for run in group.runs]
        columns = list(next(iter(read[0].values())))
        over = [[fsum(of[name] for of in run.values()) / len(run) for name in columns] for run in read]
        overall.append([group.method, group.order, *means(over)])
        for task in read[0]:
            by_task.append([group.method, group.order, task, *means([run[task].values() for run in read])])
    told = f"Mean over the tasks, all but the last. {DEFINITION}"
    found = [
        Finding("breaks", "Answers that broke", told, ["method", "order", *columns], overall, 2, decimals=1),
        Finding("breaks.tasks", "By task", DEFINITION, ["method", "order", "task", *columns], by_task, 3, decimals=1),
    ]
    return [*found, broken(study.single)] if study.single else found


DEFINITION = (
    "In percent of a task's test samples: answers with a score of 50 or more when learnt (right), those of them with "
    "less than half of it at the end (broken) and the error type of these; of the broken, those not empty that the "
    "paper's lenient profile still holds right (lenient), those right once format is set aside, for the expected words "
    "stand whole in the answer or four of its numbers make the box (mended), and either (format only). In points: the "
    "sums of all falls (lost) and rises (gained) of samples, whose difference is the task's forgetting."
)


def broken(run: Run) -> Finding:
    """Every broken answer of a run."""
    rows: list[list[Cell]] = []
    for of in answers(run).values():
        for answer in (answer for answer in of if answer.broken):
            then, now = answer.then, answer.now
            only = " + ".join(name for name in ("lenient", "mended") if getattr(answer, name))
            said = [row.text or ("a picture" if row.image else "") for row in (then, now)]
            asked = [answer.task, now.id, now.instruction, now.answer]
            rows.append([*asked, *said, run.stage(answer.since), now.error.replace("_", " "), only])
    head = [
        "task",
        "sample",
        "prompt",
        "expected",
        "when learnt",
        "at the end",
        "first broke at",
        "error",
        "format only",
    ]
    definition = (
        "Every answer that was right when learnt and is broken at the end, with both answers and the error type."
    )
    return Finding("breaks.prompts", "Prompts that broke", definition, head, rows, words=len(head))
