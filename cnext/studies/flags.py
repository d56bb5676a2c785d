"""Command-line flags of ``cnext-run``, parsed without importing torch.

Help is made from these alone: nothing that runs anything is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from cnext import methods
from cnext.config.run_config import Options, RunConfig
from cnext.studies.usage_errors import in_one_line

Launcher = Literal["local", "ray", "slurm"]


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """Learn the tasks of a suite one after another and report what is remembered.

    The same command again goes on where an earlier one was interrupted.
    """

    method: list[str] = field(default_factory=lambda: ["mage"])
    """Method, or several. `cnext list` shows them."""
    order: list[str] | None = None
    """Order of the tasks, or several: one that the suite names, "reverse", "alphabet", "random:K", or your own "a,b,c".
    Default: "paper" where the suite has it, else its first."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of initialization and of the order of samples."""
    jobs: str = "auto"
    """Runs at a time: a number, or "auto" for what cores and memory allow (one on a GPU). Results are the same."""
    launcher: Launcher = "local"
    """Where runs are done: "local", "ray" (a Ray cluster) or "slurm" (through submitit). Results are the same."""
    launcher_option: list[str] = field(default_factory=list)
    """Options of the launcher as key=value: address of the Ray cluster and options of a Ray task; or submitit's own,
    for example slurm_partition=gpu timeout_min=600."""
    baseline: str | None = None
    """Method that the table compares the others with: lora where it runs, else the first."""
    mix_environments: bool = False
    """Average runs of different environments (processor, versions, threads), which decide bits. The tables say so."""
    version: bool = False
    """Show the version and where it is installed, and stop."""
    dry_run: bool = False
    """Show the plan with an estimate of time and disk, and stop."""
    gpus: int | None = None
    """With --dry-run: forecast time, memory and disk on so many GPUs from the model's sizes; needs no weights, no data
    and no GPU."""
    tflops: float | None = None
    """With --gpus: TFLOP/s that a GPU is assumed to do in this work. Default: 400 (an H100 at 40% of its peak)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", [methods.canonical(name) for name in self.method])
        object.__setattr__(self, "baseline", self.baseline and methods.canonical(self.baseline))


def parse(arguments: list[str]) -> Any:
    """Flags with one group of typed flags per chosen method, for example ``--mage.c``.

    Raises: UserError for a flag that is not there, or a value of another type.
    """
    import tyro

    # One meaning, two names: a suite's budgets are the presets that `--preset paper` speaks of.
    arguments = [re.sub(r"^--preset(?=$|=)", "--budget", argument) for argument in arguments]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="*", default=["mage"])
    chosen = dict.fromkeys(map(methods.canonical, first.parse_known_args(arguments)[0].method))
    groups, known = [], []
    for name in chosen:
        kind = _group(methods.declared(name))
        known += [f"--{name}.{item.name.replace('_', '-')}" for item in dataclasses.fields(kind) if item.init]
        if any(item.init for item in dataclasses.fields(kind)):
            groups.append((name.replace("-", "_"), kind, field(default_factory=kind)))
    flags = dataclasses.make_dataclass("Flags", groups, bases=(Flags,), frozen=True, kw_only=True)
    description = inspect.cleandoc(Flags.__doc__ or "")
    with in_one_line(known):
        return tyro.cli(
            flags, prog="cnext-run", args=arguments, description=description, config=(tyro.conf.FlagCreatePairsOff,)
        )


def _group(kind: type) -> type:
    """What `methods.declared` gives, with its help where tyro finds it: it looks into sources, and this has none."""
    import tyro

    fields = dataclasses.fields(kind)
    if not all("help" in item.metadata for item in fields):
        return kind
    helped = [
        (item.name, Annotated[item.type, tyro.conf.arg(help=item.metadata["help"])], field(default=item.default))
        for item in fields
    ]
    return dataclasses.make_dataclass(kind.__name__, helped, namespace={"__doc__": kind.__doc__})


def configs(flags: Any) -> list[RunConfig]:
    """One RunConfig per method, order and seed, in the order in which they run."""
    shared = {item.name: getattr(flags, item.name) for item in dataclasses.fields(Options)}
    groups = {name: getattr(flags, name.replace("-", "_"), None) for name in flags.method}
    given = {name: {} if group is None else dataclasses.asdict(group) for name, group in groups.items()}
    orders = [None] if flags.order is None else flags.order
    return [
        RunConfig(method=method, hyperparameters=given[method], order=order, seed=seed, **shared)
        for method, order, seed in itertools.product(flags.method, orders, flags.seeds)
    ]
