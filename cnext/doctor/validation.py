"""``cnext validate``: check a file of settings without running it, and show the runs that it describes."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnext import backbones
from cnext.config import settings_file
from cnext.config.plan import Plan, plan
from cnext.config.run_config import Options, RunConfig, with_backbone
from cnext.config.settings_file import Settings
from cnext.doctor import checks
from cnext.errors import UserError
from cnext.studies import flags, study
from cnext.tasks import rows, suites
from cnext.tasks.base import DataError, Suite

CONTEXT = ("suite", "preset", "backbone")
"""Settings that others are checked with."""


def main(path: Path) -> int:
    """Prints the runs of a file and returns 0, or all that is wrong with it and returns 2."""
    found = settings_file.read(path, flags.kinds())
    problems = [(problem.line, problem.text) for problem in found.problems]
    plans: list[Plan] = []
    problems += list(dict.fromkeys(_one_by_one(found)))
    if not problems:
        try:
            plans = _together(path)
        except UserError as error:
            problems.append((_line_of(str(error), found), str(error)))
    problems += _around(found, plans)
    if problems:
        for line, text in sorted(problems):
            print(f"{path}:{line}: {text}" if line else f"{path}: {text}")
        print(f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}")
        return 2
    print(described(path, plans))
    return 0


def _one_by_one(found: Settings) -> Iterator[tuple[int, str]]:
    """What is wrong with single settings: each is checked alone, so that one error hides no other."""
    context: dict[str, Any] = {}
    for name in CONTEXT:
        if name not in found.values:
            continue
        if text := _wrong(**context, **{name: found.values[name]}, method="zero-shot"):
            yield found.lines[name], text
            if name == "suite":
                return
        else:
            context[name] = found.values[name]
    # Without --init-from the tasks that it has learnt have no meaning.
    single = {item.name for item in dataclasses.fields(Options)} - {*CONTEXT, "init_tasks"}
    for name in single & found.values.keys():
        if text := _wrong(**context, **{name: found.values[name]}, method="zero-shot"):
            yield found.lines[name], text
    for order in found.values.get("order") or []:
        if text := _wrong(**context, order=order, method="zero-shot"):
            yield found.lines["order"], text
    for seed in found.values.get("seeds", []):
        if text := _wrong(**context, seed=seed, method="zero-shot"):
            yield found.lines["seeds"], text
    named = found.values.get("method", ["mage"])
    for method in named:
        if text := _wrong(**context, method=method):
            yield found.lines.get("method", 0), text
    for method, own in found.hyperparameters.items():
        if method not in named:
            yield found.lines[method], f"hyperparameters of {method}, which is not among the methods {', '.join(named)}"
        for name, value in own.items():
            if text := _wrong(**context, method=method, hyperparameters={name: value}):
                yield found.lines[f"{method}.{name}"], text


def _wrong(**values: Any) -> str:
    """What is wrong with a configuration; "" for nothing. Neither data nor what it starts from is looked for."""
    try:
        plan(RunConfig(**values), elsewhere=True, forecast=True)
    except UserError as error:
        return str(error)
    return ""


def _together(path: Path) -> list[Plan]:
    """The runs, checked as cnext-run checks them before the first begins. Raises UserError."""
    given = flags.parse(["--config", str(path)])
    plans = [plan(config, elsewhere=given.launcher != "local") for config in flags.configs(given)]
    study.check(given, plans)
    for planned in plans:
        study.is_finished(planned)
    return plans


def _around(found: Settings, plans: list[Plan]) -> Iterator[tuple[int, str]]:
    """Data, weights and CLIP that are not there or do not fit."""
    options = Options(**{f.name: found.values[f.name] for f in dataclasses.fields(Options) if f.name in found.values})
    try:
        suite = plans[0].suite if plans else suites.load(options.suite)
    except UserError:
        return
    options = with_backbone(options, suite)
    if options.data is not None:
        for text in _missing(suite, options, plans):
            yield found.lines["data"], text
    looked = {}
    if options.backbone in backbones.modules():
        draws = any("image" in task.writes for task in suite.tasks)
        looked["weights"] = checks.backbones(options, draws) + checks.tasks(options, suite)
    looked["clip"] = checks.scorers(suite, options.clip)
    for name, made in looked.items():
        line = found.lines.get(name, found.lines.get("backbone" if name == "weights" else "suite", 0))
        for failed in checks.failed(made):
            yield line, f"{failed.text.rstrip('.')}{f' -> {failed.fix}' if failed.fix else ''}"


def _missing(suite: Suite, options: Options, plans: list[Plan]) -> list[str]:
    """The files of the data that a run would read and are not there."""
    assert options.data is not None, "the suite has data of its own"
    if not options.data.is_dir():
        return [f"data: expected a folder with the suite's files, {options.data} is no folder"]
    trained = {name for planned in plans for name in planned.order} or {task.name for task in suite.tasks}
    found = {}
    for task in suite.tasks:
        for split in ("train", options.split) if task.name in trained else ():
            try:
                rows.files(options.data, getattr(task, split))
            except DataError as error:
                found[str(error)] = None
    return list(found)


def _line_of(text: str, found: Settings) -> int:
    """The line of the first setting that a message names: as a flag, or else as a word."""
    names = [*re.findall(r"--([a-z][\w.-]*)", text), *re.findall(r"[a-z][\w-]*", text)]
    return next((line for name in names if (line := found.lines.get(name.replace("-", "_")))), 0)


def described(path: Path, plans: list[Plan]) -> str:
    """The runs that a file describes, resolved."""
    first, recipe = plans[0].config, plans[0].recipe
    done = sum(study.is_finished(planned) for planned in plans)
    count = "1 run" if len(plans) == 1 else f"{len(plans)} runs"
    state = f", {done} finished already" if done else ""
    shown: list[tuple[str, str]] = []
    for method, group in itertools.groupby(plans, lambda planned: planned.config.method):
        own = ", ".join(f"{name} {value}" for name, value in next(group).hyperparameters.items())
        shown.append(("method", f"{method}: {own}" if own else method))
    orders = dict.fromkeys((planned.config.order, planned.order) for planned in plans)
    shown += [("order", f"{name}: {', '.join(tasks)}") for name, tasks in orders]
    shown.append(("seeds", ", ".join(map(str, dict.fromkeys(planned.config.seed for planned in plans)))))
    where = f"data in {first.data}" if first.data else "its data are generated"
    shown.append(("suite", f"{plans[0].suite.name}, preset {first.preset}, split {first.split}; {where}"))
    weights = f", weights {first.weights}" if first.weights else ""
    shown.append(("backbone", f"{first.backbone} on {plans[0].device}{weights}"))
    steps = {name: plans[0].recipe.of(name).steps[name] for name in plans[0].order}
    listed = ", ".join(f"{name} {count}" for name, count in steps.items())
    shown.append(("steps", f"{sum(steps.values())} of each run: {listed}"))
    shown.append(("training", f"learning rate {recipe.learning_rate:g}, batch size {recipe.batch_size}"))
    shown.append(("trackers", ", ".join(first.trackers) or "none besides train.jsonl and scores.jsonl"))
    shown.append(("folder", str(first.folder) if len(plans) == 1 else f"{first.out}/<method>/<order>/seed-<seed>"))
    return "\n".join([f"{path}: {count}{state}", *(f"  {label:<10} {text}" for label, text in shown)])
