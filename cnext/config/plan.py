"""Resolve the names of a configuration and check its values, before anything is loaded: `plan`."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cnext import packages
from cnext.config import init_source
from cnext.config.init_source import InitSource
from cnext.config.run_config import LOGS, OVERRIDES, RANGES, SPLITS, Options, RunConfig, with_backbone
from cnext.errors import UserError, check_range, parse_json, unknown
from cnext.regular_files import read_bytes
from cnext.scoring.base import find_scorer, make_scorers
from cnext.tasks import suites
from cnext.tasks.base import Recipe, Suite, Task
from cnext.tasks.formats import READERS
from cnext.tasks.left_out import ON_BAD_ROW
from cnext.tasks.tables import save_datasets

RENAMED = {"block_steps": "checkpoint_interval"}
"""Fields of config.json and options.json that earlier versions wrote under another name, by that name."""

DATA_KEY = "data_sha256"
"""What a run adds to its config.json when it has read its data: the joint digest of them."""

ADDED = {
    "lr_factor": 1.0,
    "trains": "roles",
    "a": "trained",
    "pull": 0.024,
    "independent": False,
    "init_std": 0.0,
    "after_optimizer": False,
}
"""Hyperparameters that earlier versions did not have, and the values that act as those did."""
ADDED_RECIPE = {"loss_mean": "batch", "decay_frozen": False, "draws": "sample"}
"""The same of a recipe's fields. config.json omits them where they have these values."""


@dataclass(frozen=True)
class Plan:
    """A RunConfig with every name resolved, as `plan` returns it.

    Attributes:
        config: the configuration; its backbone is never "auto", its order never None, and its data is a folder or None.
        suite: with the configuration's prompts and CLIP model.
        order: names of the tasks in training order.
        recipe: the preset's, with what the configuration overrides, and no steps for the tasks of ``init_tasks``.
        device: never "auto".
        hyperparameters: of the method, defaults included.
        source: what the configuration's ``init_from`` names.
    """

    config: RunConfig
    suite: Suite
    order: tuple[str, ...]
    recipe: Recipe
    device: str
    hyperparameters: dict[str, Any]
    source: InitSource | None = None

    @property
    def trains(self) -> bool:
        """Whether there is a task that ``init_tasks`` does not name."""
        return len(self.config.init_tasks) < len(self.order)

    @property
    def evaluated(self) -> list[int]:
        """How many tasks, the first of the order, each stage is evaluated on, from stage 0 (zero-shot) on.

        Zero-shot is left out where nothing is trained, and so are the stages before the last of ``init_tasks``.
        """
        total, given = len(self.order), len(self.config.init_tasks)
        return [total if self.trains else 0, *(count if count >= given else 0 for count in self._numbers[1:])]

    def extra(self, stage: int) -> tuple[Task, ...]:
        """What a stage is evaluated on besides the tasks learnt: the next one, and the suite's held-out sets.

        The scores are kept apart from the score matrix. Nothing where nothing is trained; no next task where all are
        learnt at once.
        """
        if not self.trains or 0 < stage < len(self.config.init_tasks):
            return ()
        in_turn = 0 < stage < len(self.order) and not self._joint
        ahead = [self.suite.task(self.order[stage])] if in_turn else []
        return (*ahead, *self._able)

    @property
    def evaluations(self) -> list[int]:
        """How many evaluations each stage has, from stage 0 on: as `evaluated`, and those of `extra`."""
        return [count + len(self.extra(stage)) for stage, count in zip(self._numbers, self.evaluated, strict=True)]

    @property
    def asked(self) -> list[tuple[Task, int]]:
        """Every task in order and every held-out set, with the number of its evaluations in the run."""
        again = [task.name for stage in self._numbers for task in self.extra(stage)]
        times = {name: sum(count > i for count in self.evaluated) for i, name in enumerate(self.order)}
        names = dict.fromkeys([*self.order, *again])
        return [(self.suite.task(name), times.get(name, 0) + again.count(name)) for name in names]

    @cached_property
    def _able(self) -> tuple[Task, ...]:
        """The held-out sets that have the split, and that the backbone can read and write."""
        from cnext import backbones

        if not self.suite.held_out:
            return ()
        reads, writes = map(set, backbones.load(self.config.backbone).modalities(self.config.weights))
        able = (one for one in self.suite.held_out if {*one.reads} <= reads and {*one.writes} <= writes)
        return tuple(one for one in able if self.config.split in one.splits)

    @property
    def _joint(self) -> bool:
        from cnext import methods

        return methods.load(self.config.method).joint

    @property
    def _numbers(self) -> list[int]:
        """The numbers of the stages, 0 included."""
        total = len(self.order)
        return [0, total] if self._joint else list(range(total + 1))

    @property
    def held_out(self) -> list[str]:
        """The names of the held-out sets that the run is evaluated on."""
        return [task.name for task in self.extra(0)]

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe of every task, in order."""
        return [self.recipe.of(task) for task in self.order]

    def settings(self) -> dict[str, Any]:
        """What all processes of a run must have in common: as `as_dict`, with the kind of device alone, prompts, and
        the implementation of the ops."""
        from cnext.ops import dispatch

        kind = self.device.partition(":")[0]
        return {**self.as_dict(), "device": kind, "prompts": self.config.prompts, "ops": dispatch.best(kind)}

    def as_dict(self) -> dict[str, Any]:
        """The content of config.json: everything that determines the results, and nothing else."""
        config = self.config
        recipe = dataclasses.asdict(self.recipe)
        del recipe["hyperparameters"]  # which are resolved
        recipe["steps"] = {task: self.recipe.steps[task] for task in self.order}
        recipe = {name: value for name, value in recipe.items() if (name, value) not in ADDED_RECIPE.items()}
        values = {
            "method": config.method,
            "hyperparameters": self.hyperparameters,
            "backbone": config.backbone,
            "suite": self.suite.name,
            "budget": config.preset,
            "order": config.order,
            "tasks": list(self.order),
            "seed": config.seed,
            "split": config.split,
            "data": None if config.data is None else str(config.data),
            "device": self.device,
            "threads": config.threads,
            "checkpoint_interval": config.checkpoint_interval,
            "clip": config.clip,
            "weights": None if config.weights is None else str(config.weights),
            "backbone_options": loading_options(config.backbone, config.backbone_options),
            "recipe": recipe,
        }
        tasks = [*map(self.suite.task, self.order), *self.extra(0)]
        if code := _code(tasks) | _option_files(config.backbone, values["backbone_options"]):
            values["code"] = code
        if config.on_bad_row != Options.on_bad_row:
            values["on_bad_row"] = config.on_bad_row
        if (source := self.source) is not None:
            values |= {"init_from": str(config.init_from), "init_tasks": config.init_tasks}
            values["init"] = {"name": source.name, "kind": source.kind, "sha256": source.sha256}
            if source.merged is not None:
                values["merged"] = {"path": source.merged.path, "sha256": source.merged.sha256}
        if self.suite.modalities != Suite.modalities:
            values["modalities"] = list(self.suite.modalities)
        # With the types of a JSON file, which this is compared with.
        return json.loads(json.dumps(values))


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json or options.json of any version, by their present names."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def completed(values: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of any version with the names and hyperparameters that ``present``, of this version, has."""
    found = {name: value for name, value in current_names(values).items() if name != DATA_KEY}
    if isinstance(own := found.get("hyperparameters"), dict) and found.get("method") == present["method"]:
        found["hyperparameters"] = {n: v for n, v in ADDED.items() if n in present["hyperparameters"]} | own
    return found


def plan(config: RunConfig, elsewhere: bool = False, forecast: bool = False) -> Plan:
    """Resolves every name of a configuration and checks every value, without loading data or models.

    Args:
        elsewhere: the run is for another machine, so devices are not checked.
        forecast: nothing will be run, so no data is needed.

    Raises:
        UserError: a name is unknown (the valid ones are listed) or a value is out of range.
    """
    suite = _suite(config)
    config = with_backbone(config, suite)
    if config.order is None:
        config = dataclasses.replace(config, order=suites.default_order(suite))
    order = suites.order(suite, config.order or "")
    _check_options(config, suite)
    if isinstance(config.data, Mapping):  # which is no flag's type
        config = dataclasses.replace(config, data=save_datasets(suite, config.data, order))
    recipe = _recipe(config, suite.budgets[config.preset])
    for name in [*order, *(task.name for task in suite.held_out)]:
        _check_task(suite.task(name), suite.modalities)
    missing = [task for task in order if task not in recipe.steps]
    if missing:
        raise UserError(f"preset {config.preset} of suite {suite.name} gives no steps for: {', '.join(missing)}")
    if config.data is None and not suite.synthetic and not forecast:
        raise UserError(f"suite {suite.name} needs --data, the folder that holds its files")
    if not (elsewhere or forecast) and any("image" in suite.task(name).writes for name in order):
        from cnext.scoring.clip import needs_open_clip

        extra = config.backbone if config.backbone in packages.NEEDED_BY else ""
        packages.require_installed(f"CLIP {suite.clip}", ["open_clip_torch"] * needs_open_clip(suite.clip), extra)
    hyperparameters = _hyperparameters(config, recipe)
    source = _source(config, order, hyperparameters, forecast)
    recipe = dataclasses.replace(recipe, steps=recipe.steps | dict.fromkeys(config.init_tasks, 0))
    planned = Plan(config, suite, order, recipe, _device(config.device, elsewhere), hyperparameters, source)
    if recipe.precision == "float16" and planned.trains and config.method != "zero-shot":
        raise UserError(
            "--precision float16 is for evaluation, by cnext evaluate or --method zero-shot: gradients underflow in "
            "it; give bfloat16"
        )
    return planned


def _source(
    config: RunConfig, order: tuple[str, ...], hyperparameters: dict[str, Any], forecast: bool
) -> InitSource | None:
    """What the run starts from; None for new branches. Raises UserError where it cannot."""
    from cnext import methods

    given = config.init_tasks
    if given and config.init_from is None:
        raise UserError("--init-tasks needs --init-from, the adapter that has learnt them")
    if given != order[: len(given)]:
        raise UserError(f"--init-tasks must be the first of the order {', '.join(order)}, got {', '.join(given)}")
    if given and given != order and methods.load(config.method).joint:
        raise UserError(f"{config.method} learns all tasks at once; give all of them as --init-tasks, or none")
    if config.init_from is None or forecast:
        return None
    source = init_source.find(config.init_from)
    if source.run is not None:
        own = {name: value for name, value in ADDED.items() if name in hyperparameters}
        source.run.hyperparameters = own | source.run.hyperparameters
    expected = given if given != order else None
    init_source.check(source, config.method, config.backbone, hyperparameters, expected)
    return source


def _suite(config: RunConfig) -> Suite:
    """The suite, with the configuration's prompts and CLIP model."""
    from cnext.tasks.generated import GENERATORS

    suite = suites.load(config.suite)
    if config.clip is not None:
        suite = dataclasses.replace(suite, clip=config.clip)
    if config.prompts is not None:
        suite = suites.worded(suite, config.prompts)
    if suite.synthetic and suite.synthetic not in GENERATORS:
        raise unknown("generator (suite.json, 'synthetic')", suite.synthetic, list(GENERATORS))
    return suite


def _check_options(config: RunConfig, suite: Suite) -> None:
    from cnext import backbones

    if not suite.budgets:
        raise UserError(f"suite {suite.name} has no preset; add one to budgets in its suite.json")
    if config.preset not in suite.budgets:
        raise unknown("preset", config.preset, list(suite.budgets))
    if config.split not in SPLITS:
        raise unknown("split", config.split, SPLITS)
    if config.on_bad_row not in ON_BAD_ROW:
        raise unknown("on_bad_row", config.on_bad_row, ON_BAD_ROW)
    for name in config.trackers:
        if name not in LOGS:
            raise unknown("log", name, LOGS)
        if packages.version(name) is None:
            raise UserError(f"--log {name} needs the package {name}; pip install 'cnext[{name}]'")
    if config.backbone not in backbones.modules():
        raise unknown("backbone", config.backbone, sorted(backbones.modules()))
    for name, (least, most) in RANGES.items():
        if (value := getattr(config, name)) is not None:
            check_range(name, value, least, most)
    packages.require_backbone(config.backbone)
    loading_options(config.backbone, config.backbone_options)


def _hyperparameters(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    """All hyperparameters of the method, the preset's and its own defaults included."""
    from cnext import methods
    from cnext.methods.base import check_hyperparameters

    kind = methods.load(config.method)
    for name in recipe.hyperparameters.keys() - methods.modules().keys():
        raise unknown(f"method in suite.json (preset {config.preset})", name, sorted(methods.modules()))
    known = {field.name: field for field in dataclasses.fields(kind)}
    preset = recipe.hyperparameters.get(config.method, {})
    idle = kind.idle({**preset, **config.hyperparameters})
    given = {name: value for name, value in preset.items() if name not in idle} | dict(config.hyperparameters)
    for name, value in given.items():
        if name not in known:
            raise unknown(f"hyperparameter of {config.method}", name, list(known))
        check_type(f"hyperparameter {name} of {config.method}", value, known[name].default)
    try:
        check_hyperparameters(kind, given)
        return dataclasses.asdict(kind(**given))
    except ValueError as error:
        raise UserError(f"{config.method}: {error}") from error


def check_type(what: str, value: Any, default: Any) -> None:
    """Raises UserError for a value of another type than its default's. A float may be given as an integer."""
    kind = type(default)
    kinds = {bool: bool, int: int, float: (int, float), str: str}
    if kind in kinds and (not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind is bool)):
        raise UserError(f"{what} must be of type {kind.__name__}, as {default!r} is, got {value!r}")


def loading_options(backbone: str, given: Sequence[str]) -> dict[str, Any]:
    """Arguments ``name=value`` of a backbone's ``load``, with the types of its defaults.

    Raises:
        UserError: ``load`` has no such argument, or its value is of another type.
    """
    from cnext import backbones
    from cnext.backbones.base import Backbone

    kind = backbones.load(backbone)
    common = inspect.signature(Backbone.load).parameters
    known = {name: item.default for name, item in inspect.signature(kind.load).parameters.items() if name not in common}
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        if name in values:
            raise UserError(f"--backbone-options {name} is given twice; give it once")
        if name not in known:
            if not known:
                raise UserError(f"backbone {backbone} takes no options, got {name!r}; omit --backbone-options")
            raise unknown(f"option of backbone {backbone}", name, list(known))
        if isinstance(known[name], str):
            values[name] = value
            continue
        try:
            values[name] = parse_json(value.lower() if value in ("True", "False") else value)
        except ValueError as error:
            raise UserError(f"--backbone-options {name} takes a number, true or false, got {value!r}") from error
        if type(known[name]) is float and type(values[name]) is int:
            values[name] = float(values[name])
        if known[name] is not None and type(values[name]) is not type(known[name]):
            raise UserError(f"--backbone-options {name} takes a value like {json.dumps(known[name])}, got {value}")
    return values


def as_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The ``name=value`` that `loading_options` turns into these arguments."""
    return tuple(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items())


def _recipe(config: RunConfig, recipe: Recipe) -> Recipe:
    """The preset's recipe with what the configuration overrides, for every task."""
    from cnext.config.schedules import SCHEDULES

    given = {name: value for name in OVERRIDES if (value := getattr(config, name)) is not None}
    by_task = {task: {k: v for k, v in own.items() if k not in given} for task, own in recipe.by_task.items()}
    recipe = dataclasses.replace(recipe, **given, by_task=by_task)
    if recipe.schedule not in SCHEDULES:
        raise unknown("schedule", recipe.schedule, list(SCHEDULES))
    return recipe


def _check_task(task: Task, modalities: Sequence[str]) -> None:
    """Raises UserError for a format, a scorer or a modality that does not exist, or code that cannot be imported."""
    from cnext.adapters import roles_of

    READERS.named(task.format, task.folder, f"format of task {task.name}")
    find_scorer(task)
    try:
        roles_of(task.reads, task.writes, modalities)
    except UserError as error:
        raise UserError(f'task {task.name}: {error} (suite.json may declare others under "modalities")') from error


def _code(tasks: Sequence[Task]) -> dict[str, str]:
    """SHA-256 of the source of readers and scorers that are not cnext's: in ``code`` in config.json, if there are any.

    A run is not resumed with other code.
    """
    found = {}
    for task in tasks:
        for registry, name in ((READERS, task.format), (make_scorers(), task.scorer)):
            if digest := registry.digest(name, task.folder):
                found[name] = digest
    return found


def _option_files(backbone: str, options: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that a backbone's options name: in ``code`` too. Raises UserError where one is missing."""
    from cnext import backbones

    found = {}
    for name in backbones.load(backbone).option_files:
        if file := options.get(name):
            try:
                found[f"backbone_options.{name}"] = hashlib.sha256(read_bytes(file)).hexdigest()
            except OSError as error:
                raise UserError(f"--backbone-options {name}={file}: expected a file: {error}") from error
    return found


def _device(name: str, elsewhere: bool) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:N"])
    if not elsewhere and name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return name
