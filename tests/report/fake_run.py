"""Writes a complete run folder without a model: answers by formula, every score and metric computed from them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from analysis.small_runs import write_checkpoint
from PIL import Image
from tasks.official import lines

from cnext.report import write_report
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import ScoreMatrix, metrics

READS = {"Flickr30k": ["text"]}
WRITES = {"Flickr30k": ["image"], "HQEdit": ["image"]}
ORDER = ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")
COLOURS = {"red": (220, 50, 47), "green": (60, 170, 90), "blue": (50, 100, 220), "orange": (240, 150, 40)}
HOSTILE = "<script>alert('x')</script> | **red** & `blue`"
QUESTIONS = {
    "VQAv2": "what is the color of the {shape} ? answer the question using a single word or phrase .",
    "ImageNet": "what is the object in the image ? icon {shape} .",
    "Flickr30k": "please generate an image : a {color} {shape} in the middle .",
    "OCRVQA": "what word is written over the {shape} ?",
    "RefCOCO": "give the box of the {color} {shape} .",
    "HQEdit": "change the {shape} to {color} .",
}


def retention(task: int, stage: int) -> float:
    """The share of a task's samples answered rightly after a stage; both counted from 1, stage 0 is zero-shot."""
    if stage < task:
        return 0.06 * task % 0.2
    return max(0.05, 0.9 - 0.06 * task - 0.09 * (stage - task) + (0.12 if (stage + task) % 4 == 3 else 0.0))


def picture(color: str, shape: str, size: int, blur: float = 0.0) -> np.ndarray:
    """(size, size, 3) uint8: one shape on a dark ground; blur from 0 to 1 washes it out."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    distance = {"circle": np.hypot(x, y), "square": np.maximum(abs(x), abs(y)), "diamond": abs(x) + abs(y)}[shape]
    inside = np.clip((0.6 - distance) / (0.05 + blur) + 0.5, 0, 1)[..., None]
    ground = np.array([34, 38, 52]) + 14 * np.sin(9 * x + 5 * y)[..., None]
    return (inside * np.array(COLOURS[color]) * (1 - 0.5 * blur) + (1 - inside) * ground).clip(0, 255).astype(np.uint8)


def write_fake_run(
    run: Path,
    tasks: tuple[str, ...] = ORDER,
    *,
    stages: int | None = None,
    samples: int = 24,
    size: int = 48,
    averaging: bool = True,
    method: str = "mage",
    budget: str = "default",
    order: str = "paper",
    seed: int = 0,
) -> Path:
    """Writes the folder and returns it. stages: how many were evaluated (None: all). size: pixels of an image."""
    done = len(tasks) if stages is None else stages
    writes = {task: WRITES.get(task, ["text"]) for task in tasks}
    cells: dict[tuple[int, str], list[dict]] = {}
    for stage in range(done + 1):
        for number, task in enumerate(tasks, 1):
            if stage == 0 or number <= stage:
                cells[stage, task] = _answer(run, tasks, task, stage, samples, size, writes[task])
    profiles = {name: _profile(cells, tasks, done, writes, name) for name in ("strict", "paper")}
    strict = profiles.pop("strict")
    branches = ("text-general", "image-general", "text-expert", "image-expert")
    merges = [
        {"task": task, "branches": {b: {"mean": 1 - 1 / (t + 0.6 * i + 1), "std": 0.1} for i, b in enumerate(branches)}}
        for t, task in enumerate(tasks[:done])
    ]
    results = {
        "method": method, "backbone": "tiny", "suite": "next-tiny", "budget": budget, "order": order, "seed": seed,
        "split": "test", "tasks": list(tasks), "reads": {task: READS.get(task, ["text", "image"]) for task in tasks},
        "writes": writes, "profile": "strict", **strict, "profiles": profiles,
        "samples": dict.fromkeys(tasks, samples), "averaging": merges if averaging else None,
        "cost": {"trainable_params": 311808, "stored_bytes": 2494464, "optimizer_steps": 100 * done},
        "versions": {"cnext": "0.1.0", "torch": "2.15.0"}, "finished": done == len(tasks),
        "hyperparameters": {"rank": 8, "c": 5.0, "freeze": True},
    }  # fmt: skip
    recipe = {"steps": dict.fromkeys(tasks, 100), "batch_size": 16, "learning_rate": 0.002}
    shared = ("method", "backbone", "suite", "budget", "order", "tasks", "seed", "split")
    config = {key: results[key] for key in shared} | {"device": "cpu", "threads": 1, "recipe": recipe}
    _write(run / "config.json", {**config, "hyperparameters": results["hyperparameters"]})
    _write(run / "results.json", results)
    spent = {"train_seconds": 7.4, "evaluate_seconds": 3.1, "steps": 100, "tokens": 30400}
    spent |= {"tokens_per_second": 4108.1, "seconds_per_step": 0.074}
    stages_spent = [{"task": task, **spent} for task in tasks[:done]]
    cost = {"stages": stages_spent, "total_seconds": 10.5 * done, "peak_memory_bytes": 1_310_000_000}
    _write(run / "cost.json", cost)
    environment = {"python": "3.12.1", "cores": 2, "versions": {"numpy": "2.1"}, "core": {"cpp": True}}
    _write(run / "environment.json", environment)
    noise = random.Random(0)
    losses = [
        {"stage": t, "task": task, "step": s, "loss": 0.3 + 2.5 * math.exp(-s / 18) * noise.uniform(0.6, 1.3)}
        for t, task in enumerate(tasks[:done], 1)
        for s in range(1, 101)
    ]
    lines(run / "train.jsonl", losses)
    return run


def _answer(
    run: Path, tasks: tuple[str, ...], task: str, stage: int, samples: int, size: int, writes: list[str]
) -> list[dict]:
    """Writes the predictions of one task after one stage, and the pictures they need."""
    folder = run / "predictions" / (f"{stage}_{tasks[stage - 1]}" if stage else "0_zero-shot")
    share, rows = retention(tasks.index(task) + 1, stage), []
    for index in range(samples):
        color, shape = list(COLOURS)[index % 4], ("circle", "square", "diamond")[index % 3]
        right, source = (index * 7 % samples + 0.5) / samples < share, run / "data" / f"{color}_{shape}.png"
        other = list(COLOURS)[(index + stage) % 4]
        row = {
            "id": f"{task}-{index}",
            "instruction": QUESTIONS.get(task, "what is it ?").format(color=color, shape=shape),
            "answer": color,
        }
        row |= {"text": color, "image": None, "source_image": str(source), "target_image": None, "error": ""}
        if "image" in writes:
            blank = stage == 4 or (stage == 0 and index % 2)
            score = 0.0 if blank else round((88 if right else 46) + index % 7 - 2.5 * stage, 1)
            before = source.with_name(f"{list(COLOURS)[(index + 1) % 4]}_{shape}.png")
            row |= {"answer": "", "text": "a picture" if blank else "", "target_image": str(source), "error": "other"}
            row |= {"strict": score, "paper": score + 4, "source_image": None if task == "Flickr30k" else str(before)}
            if not blank:
                image = f"{folder.relative_to(run)}/{task}/{row['id']}.png"
                row["image"] = image
                blur = 0.1 if right else 0.15 * (stage + 1)
                _save(run / image, picture(color if right else other, shape, size, blur))
        else:
            row |= {"strict": 100.0 * right, "paper": 100.0 * (right or index % 8 == 0)}
            if not right:
                wrong = (other if other != color else "gray", f"the {shape} in the picture is {color} i think", HOSTILE)
                row |= {"text": wrong[index % 3], "error": ERROR_TYPES[min(index % 3, 1)]}
        _save(source, picture(color, shape, size))
        rows.append(row)
    lines(folder / f"{task}.jsonl", rows)
    return rows


def write_reported_run(folder: Path) -> Path:
    """A run with every section of a report, adapter updates included. Returns its page."""
    write_fake_run(folder, samples=12)
    torch.manual_seed(0)
    names = [f"layers.{n}.up_proj.{branch}.{half}" for n in (0, 1) for branch in ("a", "b") for half in "AB"]
    for stage in range(1, len(ORDER) + 1):
        write_checkpoint(folder, stage, {name: torch.randn(2, 2) for name in names}, ORDER)
    return write_report(folder)[0]


def _profile(cells: dict, tasks: tuple[str, ...], done: int, writes: dict, profile: str) -> dict:
    """score_matrix, zero_shot, metrics and, for the strict profile, error_matrix, from the answers."""
    count = len(tasks)
    matrix, shares = ScoreMatrix(count), {error: ScoreMatrix(count) for error in ERROR_TYPES}
    zero_shot = []
    for (stage, task), rows in cells.items():
        mean = math.fsum(row[profile] for row in rows) / len(rows)
        if stage == 0:
            zero_shot.append(mean)
            continue
        matrix.set(stage - 1, tasks.index(task), mean)
        for error in ERROR_TYPES:
            short = math.fsum(100 - row["strict"] for row in rows if row["error"] == error)
            shares[error].set(stage - 1, tasks.index(task), short / len(rows))
    strict = profile == "strict"
    values = metrics(matrix, zero_shot, shares if strict else None, [writes[task] for task in tasks])
    result = {"score_matrix": matrix.to_rows()[:done], "zero_shot": zero_shot, "metrics": values}
    if strict:
        result["error_matrix"] = {error: share.to_rows()[:done] for error, share in shares.items()}
    return result


def _save(path: Path, image: np.ndarray) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1))
