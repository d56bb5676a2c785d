"""Read a suite's manifests: suite.json and a JSON file for each task."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET, UnsetType, field

from cnext.errors import UserError, unknown
from cnext.records import AnyPath, FileName, ModalityName, Record, RelativePath, convert, read
from cnext.tasks.base import Recipe, Suite, Task

T = TypeVar("T", Task, Recipe)
ADVICE = "correct the manifest"
FILES, FOLDERS = ("train", "test", "validation", "reworded", "references"), ("train_images", "test_images")


class SuiteManifest(Record):
    """suite.json. budgets: recipes, or the name of another budget, as in {"paper": {...}, "default": "paper"}."""

    tasks: list[FileName]
    orders: dict[str, list[FileName]]
    budgets: dict[str, str | dict[str, Any]]
    name: FileName | UnsetType = UNSET
    description: str = ""
    synthetic: str = ""
    clip: str = Suite.clip
    backbone: FileName = FileName(Suite.backbone)
    modalities: list[ModalityName] = field(default_factory=lambda: list(map(ModalityName, Suite.modalities)))
    source: str = ""
    license: str = ""
    held_out: list[FileName] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = set(self.tasks)
        if names & set(self.held_out) or len(set(self.held_out)) < len(self.held_out):
            raise ValueError(f"Expected held-out sets, each once and no task, got {', '.join(self.held_out)}")
        if not names or len(names) < len(self.tasks):
            raise ValueError("Expected distinct tasks, at least one")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"Expected distinct modalities, at least one, got {', '.join(self.modalities) or 'none'}")
        for label, order in self.orders.items():
            if len(set(order)) < len(order) or not set(order) <= names:
                raise ValueError(f"Expected an order of tasks, each once, got {', '.join(order)!r} for {label!r}")


def _built(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A task or a recipe, of which no key may be misspelt."""
    names = [item.name for item in fields(kind) if item.name != "folder"]
    for name in values:
        if name not in names:
            raise unknown(f"field of {where}", name, names)
    return convert(values, kind, where, ADVICE)


def _task(file: Path, name: str, defaults: dict[str, Any] | None = None) -> Task:
    values = read(file, dict[str, Any], ADVICE)
    task = _built(Task, (defaults or {}) | values | {"name": name}, str(file))
    for key in FILES:
        if value := getattr(task, key):
            convert(value, RelativePath, f"{file}, {key}", ADVICE)
    for key in FOLDERS:
        convert(getattr(task, key), AnyPath, f"{file}, {key}", ADVICE)
    return replace(task, folder=str(file.parent))


def _held_out(file: Path, name: str) -> Task:
    """A held-out set: the manifest of a task without what is trained."""
    task = _task(file, name, {"train": ""})
    if task.train:
        raise UserError(f"{file}: Expected no files to train on, {name} is held out, got {task.train!r}; {ADVICE}")
    return task


def _recipe(values: dict[str, Any], where: str) -> Recipe:
    recipe = _built(Recipe, values, where)
    for task, different in recipe.by_task.items():
        _built(Recipe, {"steps": {}, **different}, f"{where}, by_task, {task}")
    return recipe


def read_suite(folder: Path) -> Suite:
    """The suite of a folder with ``suite.json`` and a manifest for each task.

    Raises: UserError naming the file, the field, what was expected and what was found.
    """
    file = folder / "suite.json"
    manifest = read(file, SuiteManifest, ADVICE)
    given = manifest.budgets
    recipes = {}
    for label, recipe in given.items():
        found = given.get(recipe) if isinstance(recipe, str) else recipe
        if not isinstance(found, dict):
            raise UserError(f"{file}: Expected an object or the name of one for budget {label!r}; {ADVICE}")
        recipes[label] = _recipe(found, f"{file}, budget {label}")
    return Suite(
        name=folder.name if manifest.name is UNSET else str(manifest.name),
        description=manifest.description,
        tasks=tuple(_task(folder / f"{name}.json", str(name)) for name in manifest.tasks),
        orders={label: tuple(map(str, order)) for label, order in manifest.orders.items()},
        budgets=recipes,
        synthetic=manifest.synthetic,
        clip=manifest.clip,
        backbone=str(manifest.backbone),
        modalities=tuple(map(str, manifest.modalities)),
        source=manifest.source,
        license=manifest.license,
        held_out=tuple(_held_out(folder / f"{name}.json", str(name)) for name in manifest.held_out),
    )
