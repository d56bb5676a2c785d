"""What a run is: everything that decides its numbers, resolved before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cnext.errors import UserError, unknown
from cnext.tasks import suites
from cnext.tasks.base import Recipe, Suite, Task
from cnext.tasks.formats import READERS

SPLITS = ("test", "validation")
LOGS = ("jsonl", "tensorboard")
OVERRIDES = (
    "learning_rate",
    "batch_size",
    "micro_batch_size",
    "schedule",
    "trainable",
    "precision",
    "checkpointing",
)
"""Flags that replace a field of the budget's recipe."""


@dataclass(frozen=True)
class Options:
    """What the runs of a study have in common. Each field is a flag of ``cnext-run``."""

    backbone: str = "tiny"
    """Model that learns."""
    suite: str = "next-tiny"
    """Suite of tasks: a name, or a folder with suite.json."""
    budget: str = "default"
    """Training budget of the suite, `--preset` by another name: "default", "smoke" for a quick check whose scores mean
    nothing, and what else `cnext list` shows: "paper" and "released" of continual-next."""
    split: Literal["test", "validation"] = "test"
    """Items that are scored. Choose hyperparameters on validation."""
    out: Path = Path("runs")
    """Folder of the study; a run is in <out>/<method>/<order>/seed-<seed>."""
    data: Path | None = None
    """Folder with the suite's files. A synthetic suite is drawn into the cache where none is given."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    threads: int = 1
    """Threads of torch on the CPU. Results are repeatable bit for bit with the same number."""
    block_steps: int = 50
    """Optimizer steps between two checkpoints: what an interruption can cost at most."""
    clip: str | None = None
    """CLIP that scores pictures, where it is not to be the suite's: a file or folder of weights, for example
    ViT-B-32.pt as OpenAI publishes it, or <tag>/<model> of open_clip."""
    prompts: Literal["released", "consistent"] | None = None
    """How tasks that write pictures are worded, where it is not to be as the suite has it. "consistent": in training
    and in the test alike, which the released files are not; the suite then has another name."""
    learning_rate: float | None = None
    """Overrides the budget's peak learning rate."""
    batch_size: int | None = None
    """Overrides the budget's batch size, of all processes together."""
    micro_batch_size: int | None = None
    """Samples that go through the model at once in each process; gradients add up. 0: the whole batch."""
    schedule: Literal["cosine", "released"] | None = None
    """Overrides the budget's learning-rate schedule. "released" climbs back in its second half, as the paper's code."""
    trainable: Literal["branches", "connections", "released"] | None = None
    """Overrides what the budget trains beside the method: nothing, the layers between vision and language, or these
    and embeddings, output head and norms, as the paper's code."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Overrides the budget's precision of the frozen model. What is trained is kept in float32."""
    checkpointing: bool | None = None
    """Overrides whether activations are computed again in the backward pass, which saves memory."""
    weights: Path | None = None
    """Folder of the backbone's released weights. The tiny backbone brings its own."""
    backbone_options: tuple[str, ...] = ()
    """What else the backbone's loading takes, as name=value, for example edit_stage=second of seed-x."""
    device_map: str | None = None
    """How one process spreads the model over several devices, for example "balanced". Default: it does not."""
    workers: int = 0
    """Processes that read and prepare samples beside the training. Results are the same with any number."""
    log: Literal["jsonl", "tensorboard"] = "jsonl"
    """"jsonl": train.jsonl and scores.jsonl, which every run writes. "tensorboard": event files beside them, in the run
    folder's tensorboard/."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Configuration of a run: one method on one order of a suite's tasks with one seed. See `Options` for the rest.

    Args:
        method: name of a method, as `cnext list` shows it.
        hyperparameters: values of the method's hyperparameters by name; its defaults for the others.
        order: "paper", "reverse", "alphabet", "random:K", or task names as "a,b,c"; None: as `suites.usual_order` says.
        seed: of the adapters' initialization and of the order of samples.

    Raises:
        UserError: by `plan`, which `cnext.run` calls first: a name is unknown, or a value is out of range.

    Example:
        >>> from cnext import RunConfig
        >>> str(RunConfig(method="mage", order="reverse", seed=1).folder)
        'runs/mage/reverse/seed-1'
    """

    method: str = "mage"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    order: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from cnext import methods

        object.__setattr__(self, "method", methods.canonical(self.method))

    @property
    def folder(self) -> Path:
        order = suites.usual_order(suites.load(self.suite)) if self.order is None else self.order
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", order)
        return Path(self.out) / self.method / label / f"seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A RunConfig with every name looked up and every default filled in; its own order is given, never None."""

    config: RunConfig
    suite: Suite
    order: tuple[str, ...]
    recipe: Recipe
    device: str
    hyperparameters: dict[str, Any]

    @property
    def recipes(self) -> list[Recipe]:
        """The recipe of every task, in order."""
        return [self.recipe.of(task) for task in self.order]

    def as_dict(self) -> dict[str, Any]:
        """What config.json holds: all that decides the numbers of a run, and nothing else."""
        config = self.config
        recipe = dataclasses.asdict(self.recipe)
        recipe["steps"] = {task: self.recipe.steps[task] for task in self.order}
        values = {
            "method": config.method,
            "hyperparameters": self.hyperparameters,
            "backbone": config.backbone,
            "suite": self.suite.name,
            "budget": config.budget,
            "order": config.order,
            "tasks": list(self.order),
            "seed": config.seed,
            "split": config.split,
            "data": None if config.data is None else str(config.data),
            "device": self.device,
            "threads": config.threads,
            "block_steps": config.block_steps,
            "clip": config.clip,
            "weights": None if config.weights is None else str(config.weights),
            "backbone_options": loading_options(config.backbone, config.backbone_options),
            "recipe": recipe,
        }
        # Through JSON, so that what is compared with a file (tuples, paths) has the file's types.
        return json.loads(json.dumps(values))


def cache() -> Path:
    """Where generated suites are kept: $CNEXT_CACHE, else $XDG_CACHE_HOME/cnext, else ~/.cache/cnext."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CNEXT_CACHE") or Path(base) / "cnext")


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")


def plan(config: RunConfig, elsewhere: bool = False, forecast: bool = False) -> Plan:
    """Looks up every name of a RunConfig. Raises UserError naming what is unknown, and the valid names.

    Args:
        elsewhere: whether the run is done on another machine, whose devices cannot be looked at from here.
        forecast: whether it is not done at all, and needs no data.
    """
    from cnext import backbones, methods
    from cnext.tasks.synthetic import GENERATORS

    suite = suites.load(config.suite)
    if config.clip is not None:
        suite = dataclasses.replace(suite, clip=config.clip)
    if config.prompts is not None:
        suite = suites.worded(suite, config.prompts)
    if config.order is None:
        config = dataclasses.replace(config, order=suites.usual_order(suite))
    order = suites.order(suite, config.order or "")
    if config.budget not in suite.budgets:
        raise unknown("budget", config.budget, list(suite.budgets))
    if config.split not in SPLITS:
        raise unknown("split", config.split, SPLITS)
    if config.log not in LOGS:
        raise unknown("log", config.log, LOGS)
    if config.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--log tensorboard needs the package tensorboard; pip install 'cnext[tensorboard]'")
    if config.backbone not in backbones.modules():
        raise unknown("backbone", config.backbone, sorted(backbones.modules()))
    for name, least in (("seed", 0), ("threads", 1), ("block_steps", 1)):
        _at_least(name, getattr(config, name), least)
    for name in ("workers", "micro_batch_size"):
        _at_least(name, getattr(config, name) or 0, 0)
    loading_options(config.backbone, config.backbone_options)
    recipe = _recipe(config, suite.budgets[config.budget])
    for name in order:
        _check_task(suite.task(name))
    missing = [task for task in order if task not in recipe.steps]
    if missing:
        raise UserError(f"budget {config.budget} of suite {suite.name} gives no steps for: {', '.join(missing)}")
    if suite.synthetic and suite.synthetic not in GENERATORS:
        raise unknown("generator (suite.json, 'synthetic')", suite.synthetic, list(GENERATORS))
    if config.data is None and not suite.synthetic and not forecast:
        raise UserError(f"suite {suite.name} needs --data, the folder that holds its files")
    kind = methods.load(config.method)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in config.hyperparameters.items():
        if name not in known:
            raise unknown(f"hyperparameter of {config.method}", name, list(known))
        _check_type(f"hyperparameter {name} of {config.method}", value, known[name].default)
    try:
        hyperparameters = dataclasses.asdict(kind(**config.hyperparameters))
    except ValueError as error:
        raise UserError(f"{config.method}: {error}") from error
    return Plan(config, suite, order, recipe, _device(config.device, elsewhere), hyperparameters)


def _check_type(what: str, value: Any, default: Any) -> None:
    """Raises UserError for a value of another type than its default's. A whole number does for a float."""
    kind = type(default)
    kinds = {bool: bool, int: int, float: (int, float), str: str}
    if kind in kinds and (not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind is bool)):
        raise UserError(f"{what} must be of type {kind.__name__}, as {default!r} is, got {value!r}")


def loading_options(backbone: str, given: Sequence[str]) -> dict[str, Any]:
    """What ``name=value`` says, as a backbone's ``load`` takes it: words for words, numbers for numbers.

    Raises: UserError for a name that its ``load`` does not have, or a value of another type.
    """
    from cnext import backbones
    from cnext.backbones.base import Backbone

    kind = backbones.load(backbone)
    common = inspect.signature(Backbone.load).parameters
    known = {name: item.default for name, item in inspect.signature(kind.load).parameters.items() if name not in common}
    values = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in known:
            raise unknown(f"option of backbone {backbone}", name, list(known) or ["none: it takes no options"])
        if isinstance(known[name], str):
            values[name] = value
            continue
        try:
            values[name] = json.loads(value)
        except ValueError as error:
            raise UserError(f"--backbone-options {name} takes a number, true or false, got {value!r}") from error
        if known[name] is not None and type(values[name]) is not type(known[name]):
            raise UserError(f"--backbone-options {name} takes a value like {json.dumps(known[name])}, got {value}")
    return values


def _recipe(config: RunConfig, recipe: Recipe) -> Recipe:
    """The budget's recipe with what the flags override, for every task."""
    from cnext.config.schedules import SCHEDULES

    if config.learning_rate is not None and not 0 < config.learning_rate < float("inf"):
        raise UserError(f"learning_rate must be positive and finite, got {config.learning_rate}")
    given = {name: value for name in OVERRIDES if (value := getattr(config, name)) is not None}
    by_task = {task: {k: v for k, v in own.items() if k not in given} for task, own in recipe.by_task.items()}
    recipe = dataclasses.replace(recipe, **given, by_task=by_task)
    if recipe.schedule not in SCHEDULES:
        raise unknown("schedule", recipe.schedule, list(SCHEDULES))
    return recipe


def _check_task(task: Task) -> None:
    """Raises UserError where a manifest names a format, a scorer or a modality that is not there."""
    from cnext.adapters import roles_of
    from cnext.scoring import make_scorers

    scorers = make_scorers()
    if task.format not in READERS:
        raise unknown(f"format of task {task.name}", task.format, list(READERS))
    if task.scorer not in scorers:
        raise unknown(f"scorer of task {task.name}", task.scorer, list(scorers))
    roles_of(task.reads, task.writes)


def _device(name: str, elsewhere: bool) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    valid = ["auto", "cpu", "cuda", "cuda:N"]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, valid) from error
    if device.type not in ("cpu", "cuda"):
        raise unknown("device", name, valid)
    if not elsewhere and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return name
