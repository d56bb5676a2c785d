"""Reads a suite's manifests: every field of the type and within the limits that its meaning has, every path inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json
from cnext.shapes import name, path, relative, wrong
from cnext.tasks.base import BY_TASK, Recipe, Suite, Task


def _number(value: Any) -> bool:
    return not wrong(value, float)


def count(value: Any) -> bool:
    """a whole number from 0 on"""
    return not wrong(value, int) and 0 <= value < 2**53


def some(value: Any) -> bool:
    """a whole number from 1 on"""
    return count(value) and value > 0


def positive(value: Any) -> bool:
    """a number above 0"""
    return _number(value) and value > 0


def not_negative(value: Any) -> bool:
    """a number from 0 on"""
    return _number(value) and value >= 0


def share(value: Any) -> bool:
    """a number from 0 to 1"""
    return _number(value) and 0 <= value <= 1


def decays(value: Any) -> bool:
    """two numbers from 0 to below 1"""
    return isinstance(value, list) and len(value) == 2 and all(share(each) and each < 1 for each in value)


def inside(value: Any) -> bool:
    """a path or pattern that stays within the data folder, or an empty string"""
    return value == "" or relative(value)


TASK = {
    "reads": [str],
    "writes": [str],
    **dict.fromkeys(("format", "scorer"), str),
    **dict.fromkeys(("train", "test", "validation?", "references?"), inside),
    **dict.fromkeys(("train_images", "test_images"), path),
    "max_new_tokens?": some,
    **dict.fromkeys(("train_count?", "test_count?"), count),
    **dict.fromkeys(("description?", "image_position?", "prompts?", "image_filter?", "test_prefix?", "source?"), str),
}
RECIPE = {
    "steps": {str: count},
    **dict.fromkeys(("train_samples?", "test_samples?", "micro_batch_size?", "warmup_steps?"), count),
    "batch_size?": some,
    **dict.fromkeys(("learning_rate?", "eps?", "max_grad_norm?"), positive),
    "weight_decay?": not_negative,
    "min_learning_rate_ratio?": share,
    "betas?": decays,
    **dict.fromkeys(("schedule?", "trainable?", "precision?"), str),
    "checkpointing?": bool,
}
RECIPE["by_task?"] = {str: {f"{field}?": RECIPE[f"{field}?"] for field in BY_TASK}}
SUITE = {
    "tasks": [name],
    "orders": {str: [name]},
    "budgets": {str: (str, RECIPE)},
    "name?": name,
    **dict.fromkeys(("description?", "synthetic?", "clip?", "source?", "license?"), str),
}


def _object(file: Path, shape: dict[str, Any]) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {file}: {error}") from error
    if found := wrong(value, shape):
        raise UserError(f"the manifest {file} is not as expected: {found}")
    return value


def _built(kind: type, values: dict[str, Any], file: Path) -> Any:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**frozen)
    except TypeError as error:
        raise UserError(f"the manifest {file} does not describe a {kind.__name__}: {error}") from error


def read(place: Path) -> Suite:
    """The suite of a folder with ``suite.json`` and a manifest for each task.

    Raises: UserError naming the file, the field, what was expected and what was found.
    """
    file = place / "suite.json"
    values = _object(file, SUITE)
    names, given = values["tasks"], values["budgets"]
    if not names or len(set(names)) < len(names):
        raise UserError(f"the manifest {file} is not as expected: tasks: expected distinct names, at least one")
    for label, order in values["orders"].items():
        if len(set(order)) < len(order) or not set(order) <= set(names):
            raise UserError(f"the manifest {file} is not as expected: orders.{label}: expected tasks, each once")
    # A budget may be the name of another: {"paper": {...}, "default": "paper"}.
    recipes = {label: given.get(recipe) if isinstance(recipe, str) else recipe for label, recipe in given.items()}
    unfit = [label for label, recipe in recipes.items() if not isinstance(recipe, dict)]
    if unfit:
        raise UserError(f"the manifest {file} is not as expected: budgets.{unfit[0]}: expected an object or its name")
    files = {task: place / f"{task}.json" for task in names}
    return Suite(
        name=values.get("name", place.name),
        description=values.get("description", ""),
        tasks=tuple(_built(Task, {"name": task, **_object(own, TASK)}, own) for task, own in files.items()),
        orders={label: tuple(order) for label, order in values["orders"].items()},
        budgets={label: _built(Recipe, recipe, file) for label, recipe in recipes.items()},
        synthetic=values.get("synthetic", ""),
        clip=values.get("clip", Suite.clip),
        source=values.get("source", ""),
        license=values.get("license", ""),
    )
