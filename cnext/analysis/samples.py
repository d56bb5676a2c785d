"""Answers to the same prompts over the stages, as in Figure 13 of Continual-NExT."""

from __future__ import annotations

import itertools

from cnext.analysis.breaks import NO_PREDICTIONS
from cnext.analysis.groups import RunGroups
from cnext.analysis.result import Cell, ResultTable, Unavailable
from cnext.analysis.run import Run, points
from cnext.runs.schemas import Answer

SHOWN = 3


def most_changed(run: Run, task: str, count: int = SHOWN) -> list[dict[int, Answer]]:
    """The samples of a task whose score changed most over stages; for tasks that write images, those with images."""
    writes_images = "image" in run.modalities("writes", task)

    def interest(stages: dict[int, Answer]) -> tuple[int, float]:
        images = sum(bool(row.image) for row in stages.values())
        scores = [row.strict for row in stages.values()]
        return images if writes_images else 0, sum(abs(after - before) for before, after in itertools.pairwise(scores))

    return sorted(run.answers(task), key=interest, reverse=True)[:count]


def samples(study: RunGroups) -> list[ResultTable]:
    """A few samples of every task of one run, with the answer at each stage."""
    run = study.single
    if run is None:
        raise Unavailable("samples are of one run; name one run folder")
    if not run.answered:
        raise Unavailable(f"{run.path}: {NO_PREDICTIONS}")
    head = ["task", "sample", "prompt", "expected", *(run.stage(stage) for stage in run.stages)]
    rows: list[list[Cell]] = []
    for task in run.tasks:
        for stages in most_changed(run, task):
            row = next(iter(stages.values()))
            rows.append(
                [task, row.id, row.instruction, row.answer or "an image"]
                + [_shown(stages[stage]) if stage in stages else "" for stage in run.stages]
            )
    definition = f"The {SHOWN} samples of each task whose score changed most: every stage's answer and its score."
    return [ResultTable("samples", "Samples over stages", definition, head, rows, words=len(head))]


def _shown(row: Answer) -> str:
    return f"{row.image or row.text or 'empty'} ({points(row.strict)})"
