"""Suites: a folder each, with ``suite.json`` and one manifest per task. A folder elsewhere is named by its path."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

from cnext.errors import UserError, unknown
from cnext.tasks.base import Recipe, Suite, Task

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.parent.name for path in FOLDER.glob("*/suite.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"the manifest {path} must be a JSON object, got {type(value).__name__}")
    return value


def _build(kind: type, values: dict[str, Any], path: Path) -> Any:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**frozen)
    except TypeError as error:
        raise UserError(f"the manifest {path} does not describe a {kind.__name__}: {error}") from error


def load(name: str) -> Suite:
    """A suite by its name, or by the path of a folder with ``suite.json``. Raises UserError with the valid names."""
    folder = FOLDER / name
    if os.sep in name or name not in names():
        folder = Path(name)
        if not (folder / "suite.json").is_file():
            raise unknown("suite", name, [*names(), "or the path of a folder with suite.json"])
    path = folder / "suite.json"
    values = _json(path)
    try:
        tasks = tuple(
            _build(Task, {"name": task, **_json(folder / f"{task}.json")}, folder / task) for task in values["tasks"]
        )
        orders = {label: tuple(order) for label, order in values["orders"].items()}
        budgets = {label: _build(Recipe, recipe, path) for label, recipe in values["budgets"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the manifest {path} needs 'tasks' (a list), 'orders' and 'budgets' (objects): {error!r}"
        ) from error
    return Suite(
        name=folder.name,
        description=values.get("description", ""),
        tasks=tasks,
        orders=orders,
        budgets=budgets,
        synthetic=values.get("synthetic", ""),
        clip=values.get("clip", Suite.clip),
    )


def order(suite: Suite, spec: str) -> tuple[str, ...]:
    """Task names in training order, from the name of an order, "reverse", "alphabet", "random:K" or "a,b,c".

    "reverse" is the first named order backwards; "random:K" is a shuffle of it seeded with K; your own list may
    leave tasks out. Raises UserError with what is wrong and the valid orders.
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
    valid = [*suite.orders, "reverse", "alphabet", "random:K", f"or a list of: {','.join(known)}"]
    if not spec:
        raise UserError(f"the order is empty; valid: {', '.join(valid)}")
    if len(listed) == 1:
        raise unknown("order", spec, valid)
    if strange:
        raise unknown(f"task in the order {spec!r}:", ", ".join(strange), valid)
    raise UserError(f"the order {spec!r} has {', '.join(repeated)} more than once; valid: {', '.join(valid)}")
