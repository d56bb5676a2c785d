"""Copies of the toy suite with another budget, changes of JSON files, and the rows of a run's logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import sealing

from cnext.backbones.tiny.model import TinyBackbone


def copy_suite(toy_suite: Path, folder: Path, **budget: object) -> Path:
    """The toy suite in a new folder, with other values in its budget."""
    shutil.copytree(toy_suite, folder)
    budgets = json.loads((folder / "suite.json").read_text())["budgets"]
    change(folder / "suite.json", budgets=budgets | {"default": budgets["default"] | budget})
    return folder


def change(file: Path, **values: object) -> None:
    """Writes other values into the JSON object in a file, with its run's seal where it has one."""
    sealing.change(file, **values)


def rows(path: Path) -> list[dict]:
    """The rows of a log, without their seals, which depend on the run."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seal"} for row in found]


def shallow(load: Callable[..., TinyBackbone]) -> Callable[..., TinyBackbone]:
    """TinyBackbone.load with one layer of its four: what a run does at each step is the same, and takes less time."""

    def loaded(*arguments: object, **named: object) -> TinyBackbone:
        tiny = load(*arguments, **named)
        tiny.language_model.layers = tiny.language_model.layers[:1]
        tiny.language_model.config.num_hidden_layers = 1
        return tiny

    return loaded
