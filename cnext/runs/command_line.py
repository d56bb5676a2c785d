"""Rebuild the command line of a run from config.json and options.json in its folder; write it as YAML too."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnext import methods
from cnext.config import settings_file
from cnext.config.plan import ADDED_RECIPE, Plan, as_words, current_names
from cnext.config.run_config import OVERRIDES, RunConfig
from cnext.errors import UserError, parse_json
from cnext.regular_files import read_text
from cnext.runs import seals
from cnext.runs.checkpoint import write_text
from cnext.tasks import suites
from cnext.tasks.base import PROMPTS

FILE = "options.json"
"""The options of a run as given. config.json has the resolved ones that influence results: no folder, no --workers."""
YAML, STUDY_YAML = "run.yaml", "study.yaml"
"""Files that ``cnext-run --config`` takes: of a run, in its folder, and of a study."""
FLAGS = {"seed": "seeds"}
"""Flags of ``cnext-run`` with another name than the field of `RunConfig`."""
KEYS = {"preset": "budget"}
"""Fields of `RunConfig` with another name in config.json, where runs of all versions have the older one."""


def write(config: RunConfig, run: str | None = None) -> Path:
    """Writes the options of a run into its folder, unless they are there. run: for their seal, once it has begun."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    path, text = config.folder / FILE, json.dumps(seals.sealed(values, FILE, run), indent=2) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)
    return path


def read(path: str | Path) -> RunConfig:
    """The configuration that `write` wrote."""
    older = {key: name for name, key in KEYS.items()}
    values = current_names(parse_json(read_text(path)))
    values = {older.get(name, name): value for name, value in values.items() if name != seals.SEAL}
    for field in dataclasses.fields(RunConfig):
        value, kind = values.get(field.name), str(field.type)
        if value is not None and kind.startswith(("Path", "tuple")):
            values[field.name] = Path(value) if kind.startswith("Path") else tuple(_several(value))
    return RunConfig(**values)


def settings(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What resolves to a configuration, by the names in `RunConfig`; hyperparameters are not among it.

    Args:
        config, options: config.json and options.json of the run; {} where an older folder has none.
    """
    config, options = current_names(config), current_names(options)
    # config.json has resolved values. A suite's name is not its folder.
    given = _from_config(config) | {
        name: value for name, value in options.items() if name == "suite" or KEYS.get(name, name) not in config
    }
    found = {}
    for field in dataclasses.fields(RunConfig):
        value, default = given.get(field.name), field.default
        # Defaults that do not influence results are left out.
        if field.name == "hyperparameters" or value in (None, [], ()):
            continue
        changed = list(_several(value)) != list(default) if isinstance(default, tuple) else str(value) != str(default)
        if KEYS.get(field.name, field.name) in config or field.name in OVERRIDES or changed:
            found[field.name] = value
    return found


def command(config: dict[str, Any], options: dict[str, Any]) -> str:
    """The command that resolves to a configuration. Arguments as of `settings`."""
    config, given = current_names(config), settings(config, options)
    words = ["cnext-run"]
    for name, value in given.items():
        words += _flag(FLAGS.get(name, name), value)
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


def write_yaml(plans: Sequence[Plan], path: Path, **more: Any) -> Path:
    """Writes the settings that resolve to these runs, all those of a study, for ``cnext-run --config``.

    Args:
        more: settings of the study alone, by the names of its flags.
    """
    first = plans[0]
    values = settings(first.as_dict(), json.loads(json.dumps(dataclasses.asdict(first.config), default=str)))
    varied = {
        "method": [planned.config.method for planned in plans],
        "order": [planned.config.order for planned in plans],
        "seeds": [planned.config.seed for planned in plans],
    }
    values = {name: _one_or_all(each) for name, each in varied.items()} | {
        name: value for name, value in (values | more).items() if name not in (*varied, *FLAGS)
    }
    hyperparameters = {planned.config.method: planned.hyperparameters for planned in plans}
    what = "this run" if len(plans) == 1 else f"these {len(plans)} runs"
    comment = (
        f"The settings of {what}, with all hyperparameters, written by cnext.\n"
        f"The same again: {shlex.join(['cnext-run', '--config', str(path), '--out', 'again'])}\n"
        "Flags win over this file. Paths are relative to the folder in which the command is given."
    )
    content = settings_file.text(values, hyperparameters, comment)
    if not path.is_file() or path.read_bytes() != content.encode():
        write_text(path, content)
    return path


def _one_or_all(values: list[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else distinct


def _several(value: Any) -> Sequence[Any]:
    """The values of an option that takes several: earlier versions wrote one of --log as text."""
    return (value,) if isinstance(value, str) else value


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
