"""Writes suites and rows for runs on models of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cnext.tasks import suites
from cnext.tasks.base import Task

Pairs = Sequence[tuple[str, str]]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _training(pairs: Pairs, image: str | None) -> list[dict[str, Any]]:
    shown = {} if image is None else {"image": image}
    said = [[{"from": "human", "value": asked}, {"from": "gpt", "value": told}] for asked, told in pairs]
    return [{"id": str(index), "conversations": both, **shown} for index, both in enumerate(said)]


def _questions(pairs: Pairs, image: str | None) -> list[dict[str, Any]]:
    shown = {} if image is None else {"image": image}
    return [{"question_id": str(i), "text": asked, "answer": told, **shown} for i, (asked, told) in enumerate(pairs)]


def write_suite(
    folder: Path,
    data: Path,
    tasks: Mapping[str, tuple[Pairs, Pairs]],
    *,
    image: bool = False,
    writes: Sequence[str] = ("text",),
    scorer: str = "exact_answer",
    **budget: Any,
) -> list[str]:
    """A suite of one's own. tasks: name to training and test pairs of question and answer. Returns flags of a run."""
    steps = budget.pop("steps")
    whole = {"steps": dict.fromkeys(tasks, steps), "warmup_steps": 1, **budget}
    write_json(
        folder / "suite.json", {"tasks": list(tasks), "orders": {"own": list(tasks)}, "budgets": {"default": whole}}
    )
    (data / "images").mkdir(parents=True, exist_ok=True)
    for number, (name, (train, test)) in enumerate(tasks.items()):
        Image.new("RGB", (20, 16), (90 * number, 120, 30)).save(data / "images" / f"{name}.png")
        manifest = {
            "reads": ["text", "image"] if image else ["text"],
            "writes": list(writes),
            "format": "llava",
            "scorer": scorer,
            "train_images": "images",
            "test_images": "images",
            "train": f"{name}/train.json",
            "test": f"{name}/test.json",
            "max_new_tokens": 8,
        }
        write_json(folder / f"{name}.json", manifest)
        shown = f"{name}.png" if image else None
        write_json(data / name / "train.json", _training(train, shown))
        write_json(data / name / "test.json", _questions(test, shown))
    return ["--suite", str(folder), "--data", str(data)]


def write_rows_of(suite: str, data: Path, answers: Mapping[str, str]) -> None:
    """A few rows of every file that some tasks of a known suite name. answers: of each task."""
    for name, answer in answers.items():
        task: Task = suites.load(suite).task(name)
        pairs = [(f"what is number {index}?", answer) for index in range(4)]
        write_json(data / task.train, _training(pairs, f"{name}.png"))
        write_json(data / task.test, _questions(pairs, f"{name}.png"))
        for folder in (task.train_images, task.test_images):
            (data / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), (90, 120, 30)).save(data / folder / f"{name}.png")
        if task.references.endswith("TextVQA_0.5.1_val.json"):
            write_json(
                data / task.references,
                {"data": [{"question_id": index, "answers": [answer] * 10} for index in range(4)]},
            )
        elif task.references:
            captions = [{"image_id": index, "caption": answer} for index in range(1, 5)]
            write_json(data / task.references, {"annotations": captions})
