"""Evaluating one task: answers, scores, and both written to the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import fsum
from pathlib import Path
from typing import Any

from cnext.distributed import collectives
from cnext.methods.base import Method
from cnext.runs.checkpoint import write_text
from cnext.scoring.base import PROFILES, Prediction, Score, Scorer
from cnext.scoring.errors import error_shares
from cnext.tasks.base import Sample, Task, Turn


def evaluate(
    method: Method,
    task: Task,
    samples: Sequence[Sample],
    scorer: Scorer,
    run: Path | None,
    stage: str,
    unevenly: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Answers a task's samples, each process its share, and scores them.

    Writes ``predictions/<stage>/<task>.jsonl`` and the pictures drawn.

    run: the run's folder, of the first process; None in the others.  unevenly: as `processes.sharded` returns it.

    Returns: the mean score and the error shares of both profiles, in percent of all samples.
    """
    with unevenly():
        answers = answered(method, task, collectives.shard(samples))
    predictions = collectives.gather_shards(answers)
    return collectives.broadcast_object({} if run is None else _scored(task, samples, scorer, predictions, run, stage))


def answered(method: Method, task: Task, samples: Sequence[Sample]) -> list[Prediction]:
    """A method's answers to the questions alone; it is told the task where its card asks for that."""
    told = task if method.card.task_id_at_test else None
    return method.answer([question(sample) for sample in samples], task.max_new_tokens, told)


def _scored(
    task: Task, samples: Sequence[Sample], scorer: Scorer, predictions: list[Prediction], run: Path, stage: str
) -> dict[str, Any]:
    scores = scorer(task, samples, predictions)
    _write(run, stage, task, samples, predictions, scores)
    count = len(scores)
    return {
        "samples": count,
        "strict": fsum(score.strict for score in scores) / count,
        "paper": fsum(score.paper for score in scores) / count,
        "errors": {profile: error_shares(scores, profile) for profile in PROFILES},
    }


def question(sample: Sample) -> Sample:
    """What a model may see of a test item: the first instruction and the image that is read. No answer, no name."""
    asked = Turn(sample.prompt or sample.turns[0].instruction)
    return Sample(id="", turns=(asked,), image=sample.image, image_first=sample.image_first, tiled=sample.tiled)


def _write(
    run: Path,
    stage: str,
    task: Task,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    scores: Sequence[Score],
) -> None:
    from PIL import Image

    folder = run / "predictions" / stage
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (sample, prediction, score) in enumerate(zip(samples, predictions, scores, strict=True)):
        image = None
        if prediction.image is not None:
            # Numbered and not named by the sample's id, which comes from a file and may be no file name.
            image = f"predictions/{stage}/{task.name}/{index:06d}.png"
            (folder / task.name).mkdir(exist_ok=True)
            Image.fromarray(prediction.image).save(run / image, compress_level=1)
        rows.append(
            {
                "id": sample.id,
                "instruction": sample.turns[0].instruction,
                "answer": sample.turns[0].answer,
                "text": prediction.text,
                "image": image,
                "source_image": sample.image and str(sample.image.absolute()),
                "target_image": sample.target_image and str(sample.target_image.absolute()),
                "strict": score.strict,
                "paper": score.paper,
                "error": score.error,
            }
        )
    write_text(folder / f"{task.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
