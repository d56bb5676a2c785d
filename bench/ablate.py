"""What each part of mage brings: variants that differ in one part, on validation items, in two orders of the tasks.

    python bench/ablate.py                        # every variant, three seeds, two orders
    python bench/ablate.py --variant base diagonal --jobs 1
    python bench/ablate.py --show                 # the table of the runs so far

Every run is written to results/next-tiny/ablation.json as it comes; run again, the program continues there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tune import Run, Table

from cnext import adapters
from cnext.adapters.attach import only_b
from cnext.averaging import PemaKron
from cnext.config.run_config import RunConfig
from cnext.methods.base import Memory, Method
from cnext.methods.ewc import Ewc
from cnext.methods.mage import Mage
from cnext.methods.parts.branches import RoleBranches
from cnext.tasks.base import Task

RESULTS = Path(__file__).resolve().parent.parent / "results" / "next-tiny" / "ablation.json"
SEEDS = (10, 11, 12)
ORDERS = ("paper", "reverse", "alphabet", "interleaved")
DEFAULT_ORDERS = ("paper", "reverse")
NEW: dict[str, Any] = {"average": "pema-kron", "trains": "all", "a": "fixed", "scale": 12.0, "pull": 0.024}
"""mage as bench/tune.py chose it."""
NOTHING = 1e30
"""A C with which nothing is merged."""


class Diagonal(Mage):
    """Only the diagonal of R: every parameter has its own Fisher information, still s_i R_jj / tr R."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule = PemaKron(pull=self.pull, c=self.c, shrinkage=1.0)


class Unobserved(Mage):
    """R over the branches that a task trains alone: the gradients of frozen ones are not read."""

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        # A group has the same matrices in every task, so those of other roles take part with a gradient of zero.
        self.zeros, self.observed = self.observed, {}
        return parameters

    def transform_gradients(self, parameters: dict[str, nn.Parameter]) -> None:
        for parameter in self.zeros.values():
            parameter.grad = torch.zeros_like(parameter)
        super().transform_gradients(parameters)
        for parameter in self.zeros.values():
            parameter.grad = None


class General12(Mage):
    """Ranks 12 and 4 in place of 8 and 8: a task trains 16 to 28 of 32."""

    general = 12

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        return {role.name: self.general if role.side == "general" else 16 - self.general for role in self.roles}


class General4(General12):
    """Ranks 4 and 12: a task trains 16 to 20 of 32."""

    general = 4


class FirstA(Mage):
    """A is fixed after the first task: the output is then linear in what moves, and averages of B are averages of W."""

    begun = False

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        if self.begun:
            for name in [name for name in parameters if name.endswith(".A")]:
                parameters.pop(name).requires_grad_(False)
            self.groups = {
                branch: {n: p for n, p in of.items() if n in parameters} for branch, of in self.groups.items()
            }
            assert isinstance(self.rule, PemaKron)
            self.observed = self.rule.frozen = {}
        self.begun = True
        return parameters


class TailMean(Mage):
    """The merge starts from the mean of the parameters over the second half of the task's steps."""

    def before_task(self, parameters: dict[str, nn.Parameter], steps: int, memory: Memory) -> None:
        super().before_task(parameters, steps, memory)
        self.moving, self.mean, self.seen, self.left = list(parameters.values()), [], 0, steps - steps // 2

    @torch.no_grad()
    def after_step(self) -> None:
        self.left -= 1
        if self.left >= 0:
            return
        self.seen += 1
        if self.seen == 1:
            self.mean = [parameter.clone() for parameter in self.moving]
        torch._foreach_lerp_(self.mean, self.moving, 1 / self.seen)

    @torch.no_grad()
    def after_task(self) -> dict[str, Any] | None:
        torch._foreach_copy_(self.moving, self.mean)
        return super().after_task()


class HeldRule(PemaKron):
    """F_old counts four times, in pull and merge, on branches that are not the task's own."""

    held: Collection[str] = ()

    def _normalized(self, key: str, factor: Tensor) -> Tensor:
        whole = super()._normalized(key, factor)
        if factor is not self.factor_old[key]:
            return whole
        names = [name for name in self.groups[key].names if name in self.parameters]
        ranks = [min(self.parameters[name].shape) for name in names]
        weight = torch.cat(
            [torch.full((r,), 2.0 if n in self.held else 1.0) for n, r in zip(names, ranks, strict=True)]
        )
        return weight[:, None] * whole * weight


class Held(Mage):
    """All branches are trained; those that are not the task's own are held by four times the pull, and by C / 4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule = HeldRule(pull=self.pull, c=self.c)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        own = adapters.branch_parameters(self.model, RoleBranches.trained_branches(self, task))
        assert isinstance(self.rule, HeldRule)
        self.rule.held = set(parameters) - set(own)
        return parameters


class EwcB(Ewc):
    """ewc with A fixed at its initial value."""

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        parameters = super().trainable(task)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name.endswith(".B"))
        return only_b(parameters)


@dataclass(frozen=True)
class Variant:
    """A row of the table: what it is, hyperparameters of mage that differ from `NEW`, and perhaps another class.

    method: another method, with ``changed`` on its defaults.
    """

    what: str
    changed: Mapping[str, Any] = field(default_factory=dict)
    kind: Callable[..., Method] | None = None
    method: str = "mage"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return {**(NEW if self.method == "mage" else {}), **self.changed}


ROLES = {"trains": "roles"}
TRAINED_A = {"a": "trained"}
EWC = {"scale": 6.0, "penalty": 0.108}


def at_scale(scale: float) -> dict[str, float]:
    """With a pull as large in proportion, as in the grid of bench/tune.py."""
    return {"scale": scale, "pull": NEW["pull"] * scale / NEW["scale"]}


VARIANTS = {
    "base": Variant("mage as tuned"),
    **{
        f"scale-{scale}": Variant(f"scale {scale}", at_scale(scale)) for scale in (12, 6, 3, 1) if scale != NEW["scale"]
    },
    "diagonal": Variant("Fisher information diagonal in a row", {}, Diagonal),
    "pull": Variant("pull alone, no merge", {"c": NOTHING}),
    "merge": Variant("merge alone, no pull", {"pull": 0.0}),
    "neither": Variant("no average at all", {"c": NOTHING, "pull": 0.0}),
    "roles": Variant("roles: other branches frozen, their gradients read", ROLES),
    "roles-unread": Variant("roles: other branches frozen, their gradients not read", ROLES, Unobserved),
    "held": Variant("C and pull of other branches: a quarter, four times", {}, Held),
    "general-12": Variant("roles, rank 12 for general branches and 4 for experts", ROLES, General12),
    "general-4": Variant("roles, rank 4 for general branches and 12 for experts", ROLES, General4),
    "a-trained": Variant("A trained", TRAINED_A),
    "a-first": Variant("A trained by the first task", TRAINED_A, FirstA),
    "pema": Variant("A trained, roles, pema: the paper's form", {"scale": 1.0, "c": 5.0}, method="mage-paper"),
    "pema-6": Variant("the same at scale 6", {"scale": 6.0, "c": 5.0}, method="mage-paper"),
    "tail-mean": Variant("merge from the mean of the second half's iterates", {}, TailMean),
    "ewc": Variant("ewc as tuned (scale 6, penalty .108)", EWC, method="ewc"),
    "ewc-12": Variant("ewc at scale 12, penalty .432", {"scale": 12.0, "penalty": 0.432}, method="ewc"),
    "ewc-12-more": Variant("ewc at scale 12, penalty 1.44", {"scale": 12.0, "penalty": 1.44}, method="ewc"),
    "ewc-a": Variant("ewc as tuned, with A fixed", EWC, EwcB, "ewc"),
}

_TRIALS: Any = None


def _load() -> None:
    """Loads, in a worker, what its runs share."""
    global _TRIALS
    from trials import Trials

    _TRIALS = Trials(RunConfig(split="validation"))


def _run(name: str, seed: int, order: str) -> dict[str, float]:
    variant = VARIANTS[name]
    return _TRIALS.run(variant.method, variant.hyperparameters, seed, order, learnt=True, kind=variant.kind)


def table(runs: Table, orders: Sequence[str] = DEFAULT_ORDERS) -> str:
    """Markdown: Avg.ACC / Forgetting / New.ACC of every variant, mean over seeds, and Avg.ACC less that of base.

    The difference is paired by seed and order: its mean, and in how many pairs it is positive.
    """
    lines = [
        f"| variant | | {' | '.join(orders)} | mean | against base | better in |",
        "|---|---|" + "---|" * (len(orders) + 3),
    ]
    rows = {
        name: {
            (row["seed"], row["order"]): row
            for row in runs.methods.get(name, {}).get("runs", ())
            if row["order"] in orders and row["settings"] == variant.hyperparameters
        }
        for name, variant in VARIANTS.items()
    }
    for name, found in rows.items():
        if not found:
            continue
        by_order = [[row for (_, where), row in found.items() if where == order] for order in orders]
        cells = " | ".join(map(_cell, [*by_order, list(found.values())]))
        pairs = [row["avg_acc"] - rows["base"][key]["avg_acc"] for key, row in found.items() if key in rows["base"]]
        against = (
            f"{statistics.fmean(pairs):+.1f} | {sum(pair > 0 for pair in pairs)} of {len(pairs)}" if pairs else " | "
        )
        lines.append(f"| `{name}` | {VARIANTS[name].what} | {cells} | {against if name != 'base' else ' | '} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Mapping[str, float]]) -> str:
    means = [statistics.fmean(row[key] for row in rows) for key in ("avg_acc", "forgetting", "new_acc")] if rows else []
    return " / ".join(f"{mean:.1f}" for mean in means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(VARIANTS)
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--variant", choices=VARIANTS, default=list(VARIANTS), help=f"default: all of {names}", **several
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: 10 11 12")
    help = f"of {', '.join(ORDERS)}; default: {' '.join(DEFAULT_ORDERS)}"
    parser.add_argument("--orders", choices=ORDERS, default=DEFAULT_ORDERS, help=help, **several)
    help = "file of all runs (default: results/next-tiny/ablation.json)"
    parser.add_argument("--out", type=Path, default=RESULTS, help=help)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print the table of the runs so far and stop")
    arguments = parser.parse_args()
    runs = Table(arguments.out)
    places = [(seed, order) for seed in arguments.seeds for order in arguments.orders]
    wanted: list[Run] = [
        (name, VARIANTS[name].hyperparameters, *place) for name in arguments.variant for place in places
    ]
    missing = [] if arguments.show else [run for run in wanted if runs.score(*run) is None]
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), _load) as processes:
        pending = {processes.submit(_run, run[0], *run[2:]): run for run in missing}
        for future in as_completed(pending):
            run, metrics = pending[future], future.result()
            runs.add(run, metrics)
            print(f"{run[0]:<16} {run[2]} {run[3]:<11} {metrics['avg_acc']:6.2f}", flush=True)
    print(table(runs, arguments.orders))


if __name__ == "__main__":
    main()
