"""Configuration of a run, as it is asked for: `RunConfig`. `cnext.config.plan` resolves and checks it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from cnext.config import settings_file
from cnext.config.given import converted
from cnext.errors import UserError
from cnext.tasks import suites
from cnext.tasks.base import LARGEST_BATCH, LEARNING_RATES, Suite

SPLITS = ("test", "validation", "reworded")
LOGS = ("jsonl", "tensorboard", "wandb")
OVERRIDES = (
    "learning_rate",
    "batch_size",
    "micro_batch_size",
    "schedule",
    "trainable",
    "precision",
    "checkpointing",
    "draws",
)
"""Flags that replace a field of the preset's recipe."""
RANGES = {
    "seed": (0, 2**53 - 1),
    "threads": (1, 1024),
    "checkpoint_interval": (1, 10**9),
    "workers": (0, 256),
    "learning_rate": LEARNING_RATES,
    "batch_size": (1, LARGEST_BATCH),
    "micro_batch_size": (0, LARGEST_BATCH),
}
"""The least and the greatest value of each number: what is outside of them is a slip, or a machine's end."""


@dataclass(frozen=True)
class Options:
    """Options that the runs of a study share. Each field is a flag of ``cnext-run``."""

    backbone: str = "auto"
    """Model to train (see `cnext list`); auto: the suite's."""
    suite: str = "next-tiny"
    """Suite of tasks: a name that `cnext list` shows, or a folder with suite.json."""
    preset: str = "default"
    """Training settings of the suite, as `cnext list` shows: "default", "paper", or "smoke" for a quick check."""
    split: Literal["test", "validation", "reworded"] = "test"
    """Split that is scored. Choose hyperparameters on validation."""
    out: Path = Path("runs")
    """Output folder; a run is written to `<out>/<method>/<order>/seed-<seed>`."""
    data: Path | None = None
    """Folder with the suite's files. None: a synthetic suite is generated into the cache."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Rows that cannot be used: refuse to start and name them, or leave them out, count and report them."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    threads: int = 1
    """CPU threads of torch. Results are bit-for-bit reproducible with the same number."""
    checkpoint_interval: int = 50
    """Optimizer steps between two checkpoints: the most that an interruption can lose."""
    clip: str | None = None
    """CLIP that scores images: a file or folder of weights, <tag>/<model> of open_clip, or a repository in the cache of
    Hugging Face. None: the suite's."""
    prompts: Literal["released", "consistent"] | None = None
    """Prompts of tasks that write images: as released, or the same in training and test. None: the suite's."""
    learning_rate: float | None = None
    """Peak learning rate. None: the preset's."""
    batch_size: int | None = None
    """Batch size, over all processes. None: the preset's."""
    micro_batch_size: int | None = None
    """Samples per forward pass and process, with gradient accumulation; 0: the whole batch. None: the preset's."""
    schedule: Literal["cosine", "released"] | None = None
    """Learning-rate schedule; "released" rises again in its second half, as the authors' code. None: the preset's."""
    trainable: Literal["branches", "connections", "released"] | None = None
    """What is trained besides the method: nothing, vision-language connectors, or all that the authors' code trains."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the frozen model; trained parameters stay in float32. float16: only to evaluate. None: the
    preset's."""
    checkpointing: bool | None = None
    """Gradient checkpointing: recompute activations in the backward pass to save memory. None: the preset's."""
    draws: Literal["sample", "epoch"] | None = None
    """Random places of images and phrases in training: one draw per sample, or per epoch as the authors' code. None:
    the preset's."""
    weights: Path | None = None
    """Folder or file of the backbone's weights; tiny and small need none."""
    backbone_options: tuple[str, ...] = ()
    """Options for loading the backbone as name=value, for example edit_stage=second for seed-x."""
    device_map: str | None = None
    """Placement of the model on several devices, for example "balanced". None: one device."""
    workers: int = 0
    """Data-loading processes. Results do not depend on their number."""
    log: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Trackers besides train.jsonl and scores.jsonl: "tensorboard" (event files in the run folder), "wandb" (Weights &
    Biases; offline with the environment variable WANDB_MODE=offline)."""
    init_from: Path | None = None
    """What the first task's training starts from: the authors' released file, PEFT adapters, a merged model, another
    run's folder (its last checkpoint) or one of its checkpoints. Zero-shot is still the pretrained model. None: new
    branches on it."""
    init_tasks: tuple[str, ...] = ()
    """The first tasks of the order, which --init-from has learnt: they are evaluated and not trained."""


T = TypeVar("T", bound=Options)


def with_backbone(options: T, suite: Suite) -> T:
    """The options with the suite's backbone in the place of "auto"."""
    return replace(options, backbone=suite.backbone) if options.backbone == "auto" else options


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """One run: a method, an order of a suite's tasks, and a seed. All further fields: see `Options`.

    Paths may be given as strings, and ``suite`` as a path.

    Attributes:
        data: as of `Options`; or, where ``suite`` is a folder of your own, ``datasets.Dataset`` objects by task and
            split, ``{"Photos": {"train": ..., "test": ...}}``, as `cnext.tasks.tables.save_datasets` takes them.
        method: as `cnext list` shows them.
        hyperparameters: the method's, by name; `cnext card METHOD` shows them. Default: the preset's for the method,
            where its suite gives any, else the method's own.
        order: "paper", "reverse", "alphabet", "random:K" or task names "a,b,c". None: "paper" where the suite has it,
            else its first order.
        seed: of the initialization and the order of samples.

    Raises:
        UserError: a value is of another type. What is named, and every number, is checked by `plan`.

    Example::

        config = RunConfig(method="mage", hyperparameters={"c": 2.0}, suite="next-tiny", seed=1, out="runs")
        config.folder  # runs/mage/paper/seed-1
    """

    method: str = "mage"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    order: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in converted(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """The run that a YAML file describes, as ``cnext-run --config`` reads it: run.yaml of a run folder for example.

        Raises:
            UserError: what is wrong with the file and in which line; or it describes several runs.
        """
        hints = get_type_hints(Options)
        varied = {"method": list[str], "order": list[str], "seeds": list[int]}
        found = settings_file.read(path, hints | varied)
        found.check()
        for name in varied:
            if len(found.values.get(name, [None])) != 1:
                raise UserError(f"{path}: {name}: expected one, for a RunConfig is one run; cnext-run takes several")
        values = {name: value for name, value in found.values.items() if name not in varied}
        values |= {name.removesuffix("s"): found.values[name][0] for name in varied if name in found.values}
        config = cls(**values)
        if others := sorted(found.hyperparameters.keys() - {config.method}):
            raise UserError(f"{path}: hyperparameters of {', '.join(others)}, but the method is {config.method}")
        preset = suites.preset_hyperparameters(config.suite, config.preset)
        given = found.given(config.method, preset.get(config.method, {}))
        return dataclasses.replace(config, hyperparameters=given)

    @property
    def trackers(self) -> tuple[str, ...]:
        """What ``log`` names besides "jsonl", which is always written; each once."""
        return tuple(name for name in dict.fromkeys(self.log) if name != "jsonl")

    @property
    def folder(self) -> Path:
        """The run folder."""
        order = suites.default_order(suites.load(self.suite)) if self.order is None else self.order
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", order)
        return Path(self.out) / self.method / label / f"seed-{self.seed}"
