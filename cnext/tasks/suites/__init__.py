"""Suites: finds, loads and describes them, and resolves task orders.

A suite is a folder with ``suite.json`` and one manifest per task, here or anywhere else by its path. Here are no data:
these are in the folder that ``--data`` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from cnext.errors import UserError, unknown
from cnext.tasks import manifests
from cnext.tasks.base import Suite

FOLDER = Path(__file__).parent
ORDERS = ("reverse", "alphabet", "random:K")
"""Orders that every suite has, in addition to its named ones."""


def names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/suite.json"))


def load(name: str) -> Suite:
    """A suite by its name, or by the path of a folder with ``suite.json``. Raises UserError with the valid names."""
    folder = FOLDER / name
    if os.sep in name or name not in names():
        folder = Path(name)
        if not (folder / "suite.json").is_file():
            raise unknown("suite", name, [*names(), "or the path of a folder with suite.json"])
    return manifests.read_suite(folder)


def preset_hyperparameters(suite: str, preset: str) -> Mapping[str, Mapping[str, Any]]:
    """What a preset sets of methods' hyperparameters, by method; {} where there is no such suite or preset."""
    try:
        return load(suite).budgets[preset].hyperparameters
    except (UserError, KeyError):
        return {}


def worded(suite: Suite, prompts: str) -> Suite:
    """The suite with "released" or "consistent" prompts in tasks that write images. If that changes a task, the suite
    gets another name, since scores under different prompts are not comparable."""
    tasks = tuple(replace(task, prompts=prompts) if "image" in task.writes else task for task in suite.tasks)
    return suite if tasks == suite.tasks else replace(suite, name=f"{suite.name}-{prompts}", tasks=tasks)


def summary(suite: Suite) -> str:
    """A suite in a few lines: what it is, its tasks, held-out sets, orders and presets."""
    return "\n".join(
        [
            f"  {suite.name:<16} {suite.description}",
            f"    tasks          {', '.join(task.name for task in suite.tasks)}",
            *([f"    held out       {', '.join(one.name for one in suite.held_out)}"] if suite.held_out else []),
            f"    orders         {', '.join([*suite.orders, *ORDERS])}, or a list: a,b,c",
            f"    presets        {', '.join(suite.budgets)}",
        ]
    )


def details(suite: Suite) -> str:
    """A suite's `summary`, and of each task its format, scorer, files and published numbers of rows."""
    known = (("annotations", suite.source), ("license", suite.license))
    lines = [summary(suite), *(f"    {label:<14} {value}" for label, value in known if value)]
    lines += _hyperparameters(suite)
    for task in suite.sets:
        lines.append(f"  {task.name}: {'+'.join(task.reads)} -> {'+'.join(task.writes)}, {task.description}")
        lines.append(f"    format, scorer {task.format}, {task.scorer}")
        for split in task.splits:
            count = getattr(task, f"{split}_count", 0)
            rows = f" ({count:,} rows published)" if count else ""
            lines.append(f"    {split:<14} {getattr(task, split)}, images in {task.image_folder(split)}{rows}")
        if task.source:
            lines.append(f"    images         {task.source}")
    return "\n".join(lines)


def _hyperparameters(suite: Suite) -> list[str]:
    """A line for all presets that give methods the same defaults, and for all methods that have the same from them."""
    presets: dict[str, list[str]] = {}
    for preset, recipe in suite.budgets.items():
        by_values: dict[str, list[str]] = {}
        for method, given in recipe.hyperparameters.items():
            by_values.setdefault(", ".join(f"{n} {value}" for n, value in given.items()), []).append(method)
        for values, found in by_values.items():
            presets.setdefault(f"{values} for {', '.join(found)}", []).append(preset)
    return [f"    hyperparameters of {', '.join(names)}: {text}" for text, names in presets.items()]


def default_order(suite: Suite) -> str:
    """The default order: "paper" if the suite has it, else its first."""
    listed = ",".join(task.name for task in suite.tasks)
    return "paper" if "paper" in suite.orders else next(iter(suite.orders), listed)


def order(suite: Suite, spec: str) -> tuple[str, ...]:
    """Task names in training order.

    Args:
        spec: a named order; "reverse", the first named order reversed; "alphabet"; "random:K", a shuffle with seed K;
            or a list "a,b,c", which may omit tasks.

    Raises:
        UserError: what is wrong, and the valid orders.
    """
    known = [task.name for task in suite.tasks]
    first = next(iter(suite.orders.values()), tuple(known))
    if spec in suite.orders:
        return suite.orders[spec]
    if spec == "reverse":
        return tuple(reversed(first))
    if spec == "alphabet":
        return tuple(sorted(first))
    if spec.startswith("random:") and spec[7:].isdecimal():
        return tuple(Random(int(spec[7:])).sample(first, len(first)))
    listed = tuple(spec.split(","))
    strange = [name for name in dict.fromkeys(listed) if name not in known]
    repeated = [name for name in dict.fromkeys(listed) if listed.count(name) > 1]
    if not strange and not repeated:
        return listed
    valid = [*suite.orders, *ORDERS, f"or a list of: {','.join(known)}"]
    if not spec:
        raise UserError(f"the order is empty; valid: {', '.join(valid)}")
    if len(listed) == 1:
        raise unknown("order", spec, valid)
    if strange:
        raise unknown(f"task in the order {spec!r}:", ", ".join(strange), valid)
    raise UserError(f"the order {spec!r} has {', '.join(repeated)} more than once; valid: {', '.join(valid)}")
