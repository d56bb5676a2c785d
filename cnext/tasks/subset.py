"""Samples a suite's rows by seed into a smaller suite, a named reduced protocol that uses the same images."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from cnext import durable
from cnext.errors import UserError
from cnext.image_files import inspect
from cnext.registry import source_of
from cnext.tasks.base import DataError, Recipe, Suite, Task
from cnext.tasks.formats import Line, scan
from cnext.tasks.kept_images import ImageBytes, cache


def write_subset(suite: Suite, data: Path, n: int, seed: int, out: Path, absolute: bool = False) -> str:
    """Writes n rows of every split of every task as a suite for ``--suite`` and ``--data``, atomically.

    Rows are sampled by the hash of seed, task, split and row number: on every machine the same, and those of a smaller
    n are a subset of those of a larger. Rows keep their ids, on which an image's random position depends. Budgets keep
    their epochs: steps and warm-up shrink with the number of training rows.

    Args:
        n: rows per split; all, if there are fewer.
        out: the folder to write.
        absolute: refer to images by absolute paths.

    Returns:
        The name of the protocol, <suite>-n<n>-seed<seed>.

    Raises:
        UserError: ``out`` exists.
        DataError: naming every malformed row, and every missing or broken image of the sampled rows.
    """
    for name, value, least in (("n", n, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if out.exists():
        raise UserError(f"{out} is there already; remove it, or name another folder with --out")
    protocol = f"{suite.name}-n{n}-seed{seed}"
    with durable.new_folder(out) as unfinished:
        _write(suite, data, n, seed, protocol, unfinished, None if absolute else os.path.realpath(out))
    return protocol


def _write(suite: Suite, data: Path, n: int, seed: int, protocol: str, folder: Path, beside: str | None) -> None:
    sampled_from: dict[str, dict[str, int]] = {}
    kept: dict[str, int] = {}
    digest = hashlib.sha256()
    for task in suite.sets:
        totals = sampled_from[task.name] = {}
        counts = {}
        unpacked: list[str] = []
        for split in task.splits:
            lines, totals[split] = sample_rows(task, data, split, n, seed)
            rows = [{**line.row, "question_id": line.sample.id} for line in lines if line.sample]
            if any(map(_holds_bytes, rows)):
                unpacked.append(split)
                _refuse_paths(task, lines)
                rows = [_as_json(row, folder / task.name / "images") for row in rows]
            counts[split] = len(rows)
            content = _rows_file(folder / _place(task, split), rows)
            digest.update(f"{task.name}/{split}\n{content}".encode())
        if task in suite.tasks:
            kept[task.name] = counts["train"]
        _json(folder / f"{task.name}.json", _manifest(task, data, counts, beside, unpacked))
        _copy_code(task, folder)
    values: dict[str, Any] = {
        "name": protocol,
        "description": f"{n} rows of every split of {suite.name}, sampled with seed {seed}",
        "source": suite.source,
        "license": suite.license,
        "clip": suite.clip,
        "backbone": suite.backbone,
        "modalities": suite.modalities,
        "tasks": [task.name for task in suite.tasks],
        "held_out": [one.name for one in suite.held_out],
        "orders": suite.orders,
        "budgets": {label: _scaled(recipe, kept, sampled_from) for label, recipe in suite.budgets.items()},
        "protocol": {"suite": suite.name, "n": n, "seed": seed, "rows": sampled_from, "sha256": digest.hexdigest()},
    }
    _json(folder / "suite.json", values)


def sample_rows(task: Task, data: Path, split: str, n: int, seed: int) -> tuple[list[Line], int]:
    """Samples n rows of a split, in the order of the files; returns them and the number of all rows."""
    problems: list[str] = []
    total = 0

    def ranked():
        nonlocal total
        for number, line in enumerate(scan(task, data, split)):
            total += 1
            if line.sample is None:
                problems.append(f"{line.origin}: {line.problem}")
            else:
                yield hashlib.sha256(f"{seed}/{task.name}/{split}/{number}".encode()).digest(), number, line

    chosen = sorted(heapq.nsmallest(n, ranked(), key=lambda item: item[:2]), key=lambda item: item[1])
    lines = [line for _, _, line in chosen]
    for line in lines:
        for image in line.sample.images if line.sample else ():
            found = inspect(image, decode=False).fault
            if found:
                problems.append(f"{line.origin}: names an image that is {found}: {image}")
    if problems:
        more = "cnext data check lists everything that is wrong with a suite's files"
        raise DataError("\n".join([f"task {task.name}: {len(problems)} unusable rows", *problems, more]))
    if not lines:
        raise DataError(f"task {task.name}: no {split} samples in {data / getattr(task, split)}")
    return lines, total


def _copy_code(task: Task, folder: Path) -> None:
    """Copies the modules of the suite's folder that a task names."""
    for name in (task.format, task.scorer):
        file = source_of(name.partition(":")[0], task.folder) if ":" in name else None
        if file and file.is_relative_to(task.folder):
            to = folder / file.relative_to(task.folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


def _place(task: Task, split: str) -> str:
    """Path of a split's rows relative to the folder, in the benchmark's layout."""
    return f"{task.name}/annotations/train_001.jsonl" if split == "train" else f"{task.name}/questions/{split}.json"


def _rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as JSONL or as a JSON list, by the suffix. Returns them as JSONL."""
    # Dates and decimals of tables become text.
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = path.suffix == ".jsonl"
    content = lines if listed else json.dumps(rows, ensure_ascii=False, indent=1, default=str) + "\n"
    path.write_text(content, encoding="utf-8")
    return lines


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, ImageBytes)


def _refuse_paths(task: Task, lines: list[Line]) -> None:
    """Raises DataError where some of the rows name images of the image folder, and others hold them as bytes."""
    kept = cache().absolute()
    for line in lines:
        if line.sample and any(not image.is_relative_to(kept) for image in line.sample.images):
            raise DataError(f"{line.origin}: task {task.name} has images as bytes and as paths; write it with one kind")


def _as_json(value: Any, images: Path) -> Any:
    """A value of a table as JSON takes it. The images in it become files in a folder, and their names."""
    if isinstance(value, ImageBytes):
        images.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(value.file(), images / value.file().name).name
    if isinstance(value, dict):
        return {str(key): _as_json(item, images) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, images) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _manifest(
    task: Task, data: Path, counts: dict[str, int], beside: str | None, unpacked: list[str]
) -> dict[str, Any]:
    """The task's manifest with the new files and the original images.

    beside: folder to which paths are relative.  unpacked: splits whose images are in the new folder.
    """
    if {"test", "validation"} & {*unpacked} and not {*task.splits} - {"train"} <= {*unpacked}:
        raise DataError(f"task {task.name} has images as bytes in one of test and validation; write both so")

    def images(split: str) -> str:
        if split in unpacked:
            return f"{task.name}/images"
        folder = os.path.abspath(data / task.image_folder(split))
        return folder if beside is None else os.path.relpath(os.path.realpath(folder), beside)

    changed = dataclasses.replace(
        task,
        **{split: _place(task, split) for split in task.splits},
        train_images=images("train"),
        test_images=images("test"),
        references="",
        train_count=counts.get("train", 0),
        test_count=counts["test"],
    )
    defaults = {item.name: item.default for item in dataclasses.fields(Task)}
    values = dataclasses.asdict(changed)
    return {key: value for key, value in values.items() if key not in ("name", "folder") and value != defaults[key]}


def _scaled(recipe: Recipe, kept: dict[str, int], sampled_from: dict[str, dict[str, int]]) -> dict[str, Any]:
    """A budget with as many epochs over the sampled rows as the original has over all rows."""
    trained = {name: rows["train"] for name, rows in sampled_from.items() if "train" in rows}
    full = {name: min(rows, recipe.train_samples or rows) for name, rows in trained.items()}
    shares = {name: min(1.0, kept[name] / full[name]) for name in kept}
    steps = {name: max(1, round(count * shares.get(name, 1.0))) for name, count in recipe.steps.items()}
    by_task = {name: dict(own) for name, own in recipe.by_task.items()}
    for name, own in by_task.items():
        if "warmup_steps" in own:
            own["warmup_steps"] = math.ceil(own["warmup_steps"] * shares.get(name, 1.0))
    return {
        **dataclasses.asdict(recipe),
        "steps": steps,
        "warmup_steps": math.ceil(recipe.warmup_steps * max(shares.values())),
        "by_task": by_task,
        "train_samples": 0,
        "test_samples": 0,
    }
