"""Command-line flags of ``cnext-run``, parsed without importing torch."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cnext import methods
from cnext.config.plan import check_type
from cnext.config.run_config import Options, RunConfig
from cnext.config.settings_file import Settings, read
from cnext.errors import UserError
from cnext.studies.usage_errors import in_one_line
from cnext.tasks import suites

Launcher = Literal["local", "ray", "slurm"]
RENAMED = {"--budget": "--preset", "--block-steps": "--checkpoint-interval"}
"""Flags of earlier versions."""
OF_A_COMMAND = ("config", "help_all", "version", "dry_run", "gpus", "tflops")
"""Flags that are no settings of a study."""


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """Train on the tasks of a suite one after another, evaluate after each, and report scores and forgetting.

    The same command resumes an interrupted run from its last checkpoint.
    """

    method: list[str] = field(default_factory=lambda: ["mage"])
    """One or more methods; `cnext list` shows them."""
    order: list[str] | None = None
    """One or more task orders: of the suite, "reverse", "alphabet", "random:K" or a list a,b,c. None: the suite's."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One or more random seeds, of initialization and of the order of samples."""
    jobs: str = "auto"
    """Parallel runs: a number, or "auto" by cores and memory (one on a GPU). Results do not depend on it."""
    launcher: Launcher = "local"
    """Where runs are executed: "local", "ray" (a Ray cluster) or "slurm" (through submitit)."""
    launcher_option: list[str] = field(default_factory=list)
    """Options of Ray tasks (and address) or of submitit, as key=value, for example slurm_partition=gpu."""
    baseline: str | None = None
    """Method that the table compares the others with. None: lora if present, else the first."""
    config: Path | None = None
    """YAML file with any of these settings, for example run.yaml of a run folder. Flags win over it."""
    mix_environments: bool = False
    """Average runs made on different processors, versions or thread counts, and say so in the tables."""
    mix_data: bool = False
    """Average runs on different data, and say so in the tables."""
    help_all: bool = False
    """Show all flags, with the hyperparameters of the methods that --method names, and exit."""
    version: bool = False
    """Print the version and its location, and exit."""
    dry_run: bool = False
    """Print the plan with an estimate of time and disk, and exit."""
    gpus: int | None = None
    """With --dry-run: estimate time, memory and disk on N GPUs from the model's sizes, without weights, data or GPU."""
    tflops: float | None = None
    """With --gpus: sustained TFLOP/s of a GPU. None: 400 (an H100 at 40% of its peak)."""


def parse(arguments: list[str]) -> Flags:
    """A `Flags` with a field for each selected method, whose hyperparameters are flags such as ``--mage.c``.

    Raises:
        UserError: a flag is unknown, or a value has the wrong type.
    """
    import tyro

    for flag, _, value in (argument.partition("=") for argument in arguments):
        if flag in RENAMED:
            raise UserError(f"{flag} is now {RENAMED[flag]}: use {RENAMED[flag]} {value or 'VALUE'}")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="*")
    for flag in ("suite", "preset", "config"):
        first.add_argument(f"--{flag}", nargs="?")
    chosen = first.parse_known_args(arguments)[0]
    settings = Settings() if chosen.config is None else read(chosen.config, kinds())
    settings.check()
    method = settings.values.get("method", ["mage"]) if chosen.method is None else chosen.method
    if others := [name for name in settings.hyperparameters if name not in method]:
        unused = f"{chosen.config}: hyperparameters of {', '.join(others)}, which is not among the methods"
        if chosen.method is None:
            raise UserError(f"{unused} ({', '.join(method)})")
        print(f"note: {unused} of --method", file=sys.stderr)
    suite, preset = (
        getattr(chosen, name) or settings.values.get(name, getattr(Options, name)) for name in ("suite", "preset")
    )
    defaults = suites.preset_hyperparameters(suite, preset)
    groups, known, values = [], [], dict(settings.values)
    for name in dict.fromkeys(method):
        kind = _group(name, defaults.get(name, {}))
        known += [f"--{name}.{item.name.replace('_', '-')}" for item in dataclasses.fields(kind) if item.init]
        if any(item.init for item in dataclasses.fields(kind)):
            label = name.replace("-", "_")
            groups.append((label, kind, field(default_factory=kind)))
            values[label] = kind(**settings.hyperparameters.get(name, {}))
    flags = dataclasses.make_dataclass("Flags", groups, bases=(Flags,), frozen=True, kw_only=True)
    description = inspect.cleandoc(Flags.__doc__ or "")
    words = ["--help" if argument == "--help-all" else argument for argument in arguments]
    with in_one_line(known):
        return tyro.cli(
            flags,
            prog="cnext-run",
            args=words,
            description=description,
            default=flags(**values),
            config=(tyro.conf.FlagCreatePairsOff,),
        )


def kinds() -> dict[str, Any]:
    """Names in a file of settings, and their types: the flags but for those that ask for something else than runs."""
    return {name: hint for name, hint in get_type_hints(Flags).items() if name not in OF_A_COMMAND}


def _group(method: str, preset: Mapping[str, Any]) -> type:
    """A dataclass of hyperparameters as `methods.declared` returns it, with the descriptions where tyro reads them.

    preset: values that are defaults in place of the method's.
    """
    import tyro

    kind, fields = methods.declared(method), []
    for item in dataclasses.fields(kind):
        values = {"default": item.default, "default_factory": item.default_factory}
        if item.name in preset:
            check_type(f"hyperparameter {item.name} of {method}", preset[item.name], item.default)
            values = {"default": preset[item.name]}
        hint = Annotated[item.type, tyro.conf.arg(help=item.metadata["help"])]
        fields.append((item.name, hint, field(**values)))
    return dataclasses.make_dataclass(kind.__name__, fields, namespace={"__doc__": kind.__doc__})


def configs(flags: Flags) -> list[RunConfig]:
    """One RunConfig per method, order and seed, in the order of execution, with the hyperparameters that were given."""
    shared = {item.name: getattr(flags, item.name) for item in dataclasses.fields(Options)}
    groups = {name: getattr(flags, name.replace("-", "_"), None) for name in flags.method}
    given = {name: {} if group is None else _given(group) for name, group in groups.items()}
    orders = [None] if flags.order is None else flags.order
    return [
        RunConfig(method=method, hyperparameters=given[method], order=order, seed=seed, **shared)
        for method, order, seed in itertools.product(flags.method, orders, flags.seeds)
    ]


def _given(group: Any) -> dict[str, Any]:
    """A group's values that differ from its defaults, which `plan` knows, and may know to have no effect."""
    default = type(group)()
    return {name: value for name, value in vars(group).items() if value != getattr(default, name)}
