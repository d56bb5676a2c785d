"""Finished runs of three small tasks, as far as analyses read them: files by hand, no model and no pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tasks.official import lines

from cnext.analysis.run import Run
from cnext.runs import schemas
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import ScoreMatrix, metrics

TASKS = ("say", "draw", "name")
WRITES = {"say": ["text"], "draw": ["image"], "name": ["text"]}
READS = {"say": ["text", "image"], "draw": ["text"], "name": ["text", "image"]}
MATRIX = ((50.0, None, None), (40.0, 80.0, None), (45.0, 70.0, 60.0))


def results(method: str = "lora", order: str = "paper", seed: int = 0, matrix: Any = MATRIX, **more: Any) -> dict:
    """A results.json. All that was lost is booked to hallucination."""
    tasks = more.pop("tasks", TASKS)
    scores = ScoreMatrix.from_rows(matrix)
    lost = [[None if value is None else 100 - value for value in row] for row in matrix]
    none = [[None if value is None else 0.0 for value in row] for row in matrix]
    errors = {kind: lost if kind == "hallucination" else none for kind in ERROR_TYPES}
    shares = {kind: ScoreMatrix.from_rows(rows) for kind, rows in errors.items()}
    return {
        "method": method, "order": order, "seed": seed, "hyperparameters": {}, "suite": "toy", "backbone": "tiny",
        "split": "test", "budget": "default", "finished": True, "joint": False, "profile": "strict",
        "tasks": list(tasks), "samples": dict.fromkeys(TASKS, 8), "reads": READS, "writes": WRITES,
        "score_matrix": [list(row) for row in matrix], "zero_shot": [10.0] * len(tasks), "error_matrix": errors,
        "metrics": metrics(scores, [10.0] * len(tasks), shares, [WRITES[task] for task in tasks]),
        "cost": {"optimizer_steps": 12},
        **more,
    }  # fmt: skip


def write(folder: Path, **more: Any) -> Path:
    """A run folder with results.json and config.json."""
    found = results(**more)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))
    setting = {key: found[key] for key in ("suite", "backbone", "split", "budget")}
    (folder / "config.json").write_text(json.dumps(setting | {"recipe": {"steps": dict.fromkeys(TASKS, 4)}}))
    return folder


def run(**more: Any) -> Run:
    """A run without a folder."""
    return Run(Path("nowhere"), schemas.convert(results(**more), schemas.Results, "results.json"))


def answer(task: str, number: int, text: str, strict: float, **more: Any) -> dict:
    """A row of predictions. The answer expected is "red"."""
    found = {"id": f"{task}-{number}", "instruction": "What color?", "answer": "red", "text": text, "image": None}
    error = "" if strict == 100 else "hallucination"
    return (
        found | {"source_image": None, "target_image": None, "strict": strict, "paper": strict, "error": error} | more
    )


def write_answers(folder: Path, stage: str, task: str, rows: list[dict]) -> None:
    lines(folder / "predictions" / stage / f"{task}.jsonl", rows)


def write_checkpoint(
    folder: Path, stage: int, adapters: dict[str, torch.Tensor], tasks: tuple[str, ...] = TASKS
) -> Path:
    """The adapters of a stage."""
    file = folder / "checkpoints" / f"{stage}_{tasks[stage - 1]}" / "adapters.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapters, file)
    return file
