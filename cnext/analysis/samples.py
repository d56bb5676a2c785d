"""The same prompts through the stages, as in Figure 13 of Continual-NExT."""

from __future__ import annotations

import itertools

from cnext.analysis.breaks import NO_PREDICTIONS
from cnext.analysis.finding import Cell, Finding, Unavailable
from cnext.analysis.groups import Study
from cnext.analysis.run import Run, points
from cnext.runs.schemas import Answer

SHOWN = 3


def telling(run: Run, task: str, count: int = SHOWN) -> list[dict[int, Answer]]:
    """Of a task's samples those whose score changed most over stages; where pictures are asked, first those drawn."""
    pictures = "image" in run.modalities("writes", task)

    def interest(stages: dict[int, Answer]) -> tuple[int, float]:
        drawn = sum(bool(row.image) for row in stages.values())
        scores = [row.strict for row in stages.values()]
        return drawn if pictures else 0, sum(abs(after - before) for before, after in itertools.pairwise(scores))

    return sorted(run.answers(task), key=interest, reverse=True)[:count]


def samples(study: Study) -> list[Finding]:
    """A few samples of every task of one run, with the answer at each stage."""
    run = study.single
    if run is None:
        raise Unavailable("samples are shown of one run; name one run folder")
    if not run.answered:
        raise Unavailable(f"{run.path}: {NO_PREDICTIONS}")
    head = ["task", "sample", "prompt", "expected", *(run.stage(stage) for stage in run.stages)]
    rows: list[list[Cell]] = []
    for task in run.tasks:
        for stages in telling(run, task):
            row = next(iter(stages.values()))
            rows.append(
                [task, row.id, row.instruction, row.answer or "a picture"]
                + [_said(stages[stage]) if stage in stages else "" for stage in run.stages]
            )
    definition = f"The {SHOWN} samples of each task whose score changed most: every stage's answer and its score."
    return [Finding("samples", "Samples over stages", definition, head, rows, words=len(head))]


def _said(row: Answer) -> str:
    return f"{row.image or row.text or 'nothing'} ({points(row.strict)})"
