"""Evaluate a task: generate answers, score them, and write both to the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from cnext import durable
from cnext.distributed import collectives
from cnext.methods.base import Method
from cnext.runs.checkpoint import write_text
from cnext.runs.schemas import StageScore
from cnext.scoring.base import PROFILES, Prediction, Score, Scorer
from cnext.scoring.errors import error_shares
from cnext.tasks.base import Sample, Task, Turn


def evaluate(
    method: Method,
    task: Task,
    samples: Sequence[Sample],
    scorer: Scorer,
    run: Path | None,
    stage: int,
    trained: str,
    uneven: Callable[[], AbstractContextManager[None]] = nullcontext,
    task_id: Task | None = None,
) -> StageScore:
    """Answers and scores a task's samples; every process answers its shard.

    Rank 0 writes ``predictions/<stage>_<trained>/<task>.jsonl`` and the generated images.

    Args:
        run: the run folder on rank 0, None on other ranks.
        stage: its number; ``trained``: what it trained.
        uneven: as `processes.sharded` returns it.
        task_id: as in `answer`.

    Returns: mean scores and error shares in percent of all samples, the same on every rank.
    """
    with uneven():
        answers = answer(method, task, collectives.shard(samples), task_id)
    predictions, score = collectives.gather_shards(answers), None
    if run is not None:
        scores = scorer(task, samples, predictions)
        sha256 = _write(run, f"{stage}_{trained}", task, samples, predictions, scores)
        score = replace(_mean(stage, trained, task, scores), predictions=sha256)
    score = collectives.broadcast_object(score)
    assert score is not None, "rank 0 has the run folder"
    return score


def answer(method: Method, task: Task, samples: Sequence[Sample], task_id: Task | None = None) -> list[Prediction]:
    """A method's answers. It sees `question` of each sample, and the task only where its card asks for it.

    task_id: the task that it is given as the samples' own, where these are of none, as those of a held-out set.
    """
    task_id = (task_id or task) if method.card.task_id_at_test else None
    return method.answer([question(sample) for sample in samples], task.max_new_tokens, task_id)


def _mean(stage: int, trained: str, task: Task, scores: Sequence[Score]) -> StageScore:
    return StageScore(
        stage=stage,
        trained=trained,
        task=task.name,
        scorer=task.scorer,
        samples=len(scores),
        strict=fsum(score.strict for score in scores) / len(scores),
        paper=fsum(score.paper for score in scores) / len(scores),
        errors={profile: error_shares(scores, profile) for profile in PROFILES},
    )


def question(sample: Sample) -> Sample:
    """What a model sees of a test sample: the first instruction, what it reads, and whether an image is asked for.

    No answer, no id.
    """
    asked = Turn(sample.prompt or sample.turns[0].instruction)
    return Sample(
        id="",
        turns=(asked,),
        image=sample.image,
        image_first=sample.image_first,
        tiled=sample.tiled,
        asks_image=sample.draws,
        media=sample.media,
    )


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)
    return content.getvalue()


def _write(
    run: Path,
    stage: str,
    task: Task,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    scores: Sequence[Score],
) -> str:
    """Writes the answers. Returns the SHA-256 of their file."""
    folder = run / "predictions" / stage
    # Not its parents: where the run folder was moved, none is made in its place.
    for place in (run, run / "predictions", folder):
        place.mkdir(exist_ok=True)
        durable.sync(place.parent)
    rows: list[dict[str, Any]] = []
    drawn: list[tuple[int, np.ndarray]] = []
    for index, (sample, prediction, score) in enumerate(zip(samples, predictions, scores, strict=True)):
        image, released = None, {}
        if prediction.released_text is not None:
            released["released_text"] = prediction.released_text
        if prediction.image is not None:
            # Numbered and not named by the sample's id, which comes from a file and may be no file name.
            image = f"predictions/{stage}/{task.name}/{index:06d}.png"
            drawn.append((index, prediction.image))
        rows.append(
            {
                "id": sample.id,
                "instruction": sample.turns[0].instruction,
                "answer": sample.turns[0].answer,
                "text": prediction.text,
                **released,
                "image": image,
                "source_image": sample.image and str(sample.image.absolute()),
                "target_image": sample.target_image and str(sample.target_image.absolute()),
                "strict": score.strict,
                "paper": score.paper,
                "error": score.error,
            }
        )

    def pictures() -> Iterator[tuple[str, bytes]]:
        for index, pixels in drawn:
            content = _png(pixels)
            rows[index]["image_sha256"] = hashlib.sha256(content).hexdigest()
            yield f"{index:06d}.png", content

    if drawn:
        durable.make_folder(folder / task.name)
        durable.write_all(folder / task.name, pictures())
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(folder / f"{task.name}.jsonl", text)
    return hashlib.sha256(text.encode()).hexdigest()
