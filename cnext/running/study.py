"""``cnext-run``: one run, or several methods, orders and seeds one after another.

cnext-run --method mage
cnext-run --method mage lora --seeds 0 1 2
cnext-run --method mage --budget smoke
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import statistics
from dataclasses import dataclass, field
from typing import Any

from cnext import methods
from cnext.running.config import Options, RunConfig, plan

SHOWN = {"Avg.ACC": "avg_acc", "Forgetting": "forgetting", "New.ACC": "new_acc"}


@dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """Learn the tasks of a suite one after another and report what is remembered.

    The same command again goes on where an earlier one was interrupted.
    """

    method: list[str] = field(default_factory=lambda: ["mage"])
    """Method, or several. `cnext list` shows them."""
    order: list[str] = field(default_factory=lambda: ["paper"])
    """Order of the tasks, or several: "paper", "reverse", "alphabet", "random:K", or your own "a,b,c"."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of initialization and of the order of samples."""
    dry_run: bool = False
    """Show the plan with an estimate of time and disk, and stop."""


def _parse(arguments: list[str]) -> Any:
    """Flags with one group of typed flags per chosen method, for example ``--mage.c``."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="+", default=["mage"])
    chosen = list(dict.fromkeys(first.parse_known_args(arguments)[0].method))
    groups = []
    for name in chosen:
        kind = methods.load(name)
        if any(item.init for item in dataclasses.fields(kind)):
            groups.append((name.replace("-", "_"), kind, field(default_factory=kind)))
    flags = dataclasses.make_dataclass("Flags", groups, bases=(Flags,), frozen=True, kw_only=True)
    description = inspect.cleandoc(Flags.__doc__ or "")
    return tyro.cli(
        flags, prog="cnext-run", args=arguments, description=description, config=(tyro.conf.FlagCreatePairsOff,)
    )


def configs(flags: Any) -> list[RunConfig]:
    """One RunConfig per method, order and seed, in the order in which they run."""
    shared = {item.name: getattr(flags, item.name) for item in dataclasses.fields(Options)}
    return [
        RunConfig(
            method=method,
            hyperparameters=dataclasses.asdict(
                getattr(flags, method.replace("-", "_"), None) or methods.load(method)()
            ),
            order=order,
            seed=seed,
            **shared,
        )
        for method, order, seed in itertools.product(flags.method, flags.order, flags.seeds)
    ]


def table(outcomes: list[dict[str, Any]]) -> str:
    """Mean, sample standard deviation and n over seeds, a line per method and order."""
    lines = [f"{'method':<14} {'order':<12} {'n':>2}" + "".join(f"{name:>18}" for name in SHOWN)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome["method"], outcome["order"]), []).append(outcome["metrics"])
    for (method, order), found in groups.items():
        cells = []
        for key in SHOWN.values():
            values = [metrics[key] for metrics in found if metrics[key] is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "-")
        lines.append(f"{method:<14} {order:<12} {len(found):>2}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs what the flags ask for. Every name is checked before the first run starts."""
    flags = _parse(arguments)
    runs = configs(flags)
    plans = [plan(config) for config in runs]
    if flags.dry_run:
        from cnext.running.dry_run import estimate

        print("\n\n".join(estimate(planned) for planned in plans))
        return 0
    from cnext.running.runner import run

    outcomes = [run(config) for config in runs]
    if len(outcomes) > 1:
        print(table(outcomes))
    return 0
