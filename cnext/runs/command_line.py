"""Rebuild the command line of a run from config.json and options.json in its folder."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from cnext import methods
from cnext.config.run_config import ADDED_RECIPE, OVERRIDES, RunConfig, as_words, current_names
from cnext.errors import UserError
from cnext.runs.checkpoint import write_text
from cnext.tasks import suites
from cnext.tasks.base import PROMPTS

FILE = "options.json"
"""The options of a run as given. config.json has the resolved ones that influence results: no folder, no --workers."""
FLAGS = {"seed": "seeds"}
"""Flags of ``cnext-run`` with another name than the field of `RunConfig`."""
KEYS = {"preset": "budget"}
"""Fields of `RunConfig` with another name in config.json, where runs of all versions have the older one."""


def write(config: RunConfig) -> Path:
    """Writes the options of a run into its folder, unless they are there."""
    path, text = config.folder / FILE, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)
    return path


def read(path: str | Path) -> RunConfig:
    """The configuration that `write` wrote."""
    older = {key: name for name, key in KEYS.items()}
    values = current_names(json.loads(Path(path).read_text(encoding="utf-8")))
    values = {older.get(name, name): value for name, value in values.items()}
    for field in dataclasses.fields(RunConfig):
        value, kind = values.get(field.name), str(field.type)
        if value is not None and kind.startswith(("Path", "tuple")):
            values[field.name] = Path(value) if kind.startswith("Path") else tuple(value)
    return RunConfig(**values)


def command(config: dict[str, Any], options: dict[str, Any]) -> str:
    """The command that resolves to a configuration.

    Args:
        config, options: config.json and options.json of the run; {} where an older folder has none.
    """
    config, options = current_names(config), current_names(options)
    # config.json has resolved values. A suite's name is not its folder.
    given = _from_config(config) | {
        name: value for name, value in options.items() if name == "suite" or KEYS.get(name, name) not in config
    }
    words = ["cnext-run"]
    for field in dataclasses.fields(RunConfig):
        value = given.get(field.name)
        # Defaults that do not influence results are left out.
        if field.name == "hyperparameters" or value in (None, [], ()):
            continue
        if KEYS.get(field.name, field.name) in config or field.name in OVERRIDES or str(value) != str(field.default):
            words += _flag(FLAGS.get(field.name, field.name), value)
    method = config.get("method", "")
    preset = suites.preset_hyperparameters(given.get("suite", ""), config.get("budget", ""))
    defaults = _defaults(method) | preset.get(method, {})
    for name, value in config.get("hyperparameters", {}).items():
        label = f"{method}.{name}"
        if isinstance(value, bool):
            # Only where it differs from the default: --no-x if that is true.
            words += _flag(label if value else f"{method}.no_{name}") if value != defaults.get(name) else []
        elif value is not None or defaults.get(name) is not None:
            words += _flag(label, value)
    return shlex.join(words)


def _flag(name: str, *values: Any) -> list[str]:
    listed = [each for value in values for each in (value if isinstance(value, list | tuple) else [value])]
    return [f"--{name.replace('_', '-')}", *map(str, listed)]


def _defaults(method: str) -> dict[str, Any]:
    """The defaults of a method's hyperparameters; {} for a method that is not installed here."""
    try:
        return {field.name: field.default for field in dataclasses.fields(methods.declared(method))}
    except UserError:
        return {}


def _from_config(config: dict[str, Any]) -> dict[str, Any]:
    """Options that resolve to a configuration, as far as it has them."""
    names = {field.name: KEYS.get(field.name, field.name) for field in dataclasses.fields(RunConfig)}
    given = {name: config[key] for name, key in names.items() if key in config}
    recipe = ADDED_RECIPE | config["recipe"] if "recipe" in config else {}
    # A flag sets a field for all tasks.
    uneven = {name for own in recipe.get("by_task", {}).values() for name in own}
    given |= {name: recipe[name] for name in OVERRIDES if name in recipe and name not in uneven}
    given["backbone_options"] = as_words(config.get("backbone_options", {}))
    suite = config.get("suite", "")
    base, _, wording = suite.rpartition("-")
    if suite not in suites.names():
        worded = wording in PROMPTS and base in suites.names()
        # The folder of an unknown suite is not recorded.
        given |= {"suite": base, "prompts": wording} if worded else {"suite": f"path/to/{suite}"}
    return given
