"""The ablation's variants differ from mage in the part that they name, and its table pairs runs by seed and order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ablate
import pytest
import torch
from ablate import NEW, VARIANTS
from torch import Tensor
from trials import Trials
from tune import Table

from cnext import RunConfig, methods


@pytest.fixture(scope="module")
def trials(data: Path, toy_suite: Path) -> Trials:
    return Trials(RunConfig(suite=str(toy_suite), data=data, split="validation"))


@dataclass
class Stage:
    """The adapter's parameters at a task's end after the merge; the task's trained branches; R, and who is held."""

    end: dict[str, Tensor]
    trained: set[str]
    factor: dict[str, Tensor]
    held: set[str]


@functools.cache
def stages(trials: Trials, name: str) -> list[Stage]:
    """The stages of a run of a variant."""
    variant, found = VARIANTS[name], []

    class Recorded(variant.kind or methods.load(variant.method)):  # type: ignore[misc]
        def after_task(self) -> Any:
            factor = {key: tensor.clone() for key, tensor in getattr(self.rule, "factor_new", {}).items()}
            given = super().after_task()
            end = {n: p.detach().clone() for n, p in self.adapter_parameters().items()}
            found.append(Stage(end, set(self.groups), factor, set(getattr(self.rule, "held", ()))))
            return given

    trials.run(variant.method, variant.hyperparameters, 0, "paper", kind=Recorded)
    return found


@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if variant.method != "ewc" and name != "base"]
)
def test_a_variant_learns_something_else(trials: Trials, name: str) -> None:
    """In every variant the second task ends elsewhere than in base, and everything stays finite."""
    end, base = stages(trials, name)[-1].end, stages(trials, "base")[-1].end
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert any(not torch.equal(base[key], end[key]) for key in base)


def test_a_is_fixed_after_the_first_task(trials: Trials) -> None:
    ends = [stage.end for stage in stages(trials, "a-first")]
    for other in ends[1:]:
        moved = {key.rpartition(".")[2] for key in other if not torch.equal(other[key], ends[0][key])}
        assert moved == {"B"}


def test_the_merge_starts_from_the_mean_of_the_second_half(trials: Trials) -> None:
    """Against the iterates of a run of which this variant is the same up to its first task's end."""
    iterates: list[dict[str, Tensor]] = []

    class Watched(ablate.TailMean):
        def after_step(self) -> None:
            super().after_step()
            iterates.append({n: p.detach().clone() for n, p in self.adapter_parameters().items()})

        def after_task(self) -> Any:
            given = super().after_task()
            self.ends = [
                *getattr(self, "ends", []),
                {n: p.detach().clone() for n, p in self.adapter_parameters().items()},
            ]
            made.append(self)
            return given

    made: list[Watched] = []
    trials.run("mage", NEW, 0, "paper", kind=Watched)
    steps = len(iterates) // len(made)
    second_half = iterates[steps // 2 : steps]
    for key, end in made[0].ends[0].items():
        mean = torch.stack([iterate[key].double() for iterate in second_half]).mean(0)
        torch.testing.assert_close(end.double(), mean, rtol=1e-5, atol=1e-7)


def test_the_branches_of_other_roles_are_held(trials: Trials) -> None:
    """They move less in the second task than in base, and by more than the task's own do."""
    base, held = stages(trials, "base"), stages(trials, "held")
    assert held[1].held
    moved = {key: float((held[1].end[key] - held[0].end[key]).norm()) for key in held[1].end if key.endswith(".B")}
    ratios = {key: moved[key] / float((base[1].end[key] - base[0].end[key]).norm()) for key in moved}
    of_held = [ratio for key, ratio in ratios.items() if key in held[1].held]
    of_own = [ratio for key, ratio in ratios.items() if key not in held[1].held]
    assert fmean(of_held) < 0.9 < fmean(of_own)


@pytest.mark.parametrize(("name", "read"), [("roles", True), ("roles-unread", False)])
def test_whether_the_gradients_of_frozen_branches_are_read(trials: Trials, name: str, read: bool) -> None:
    first = stages(trials, name)[0]
    for key, factor in first.factor.items():
        names = sorted(n for n in first.end if n.startswith(key[:-1]) and n.endswith(key[-1:]))
        trained = [any(f".{branch}." in n for branch in first.trained) for n in names]
        columns = torch.tensor(trained).repeat_interleave(8)
        assert not columns.all()
        assert factor.diagonal()[columns].any()
        if key.endswith("B"):  # A of a branch whose B is still zero has no gradient
            assert bool(factor.diagonal()[~columns].any()) is read


def test_the_readme_has_the_table_of_the_runs() -> None:
    text = ablate.RESULTS.with_name("README.md").read_text(encoding="utf-8")
    assert ablate.table(Table(ablate.RESULTS)) in text


def test_the_table_pairs_by_seed_and_order(tmp_path: Path) -> None:
    runs = Table(tmp_path / "runs.json")
    scores = {"base": (60.0, 50.0), "roles": (59.0, 51.5)}
    for name, pair in scores.items():
        for order, score in zip(("paper", "reverse"), pair, strict=True):
            runs.add(
                (name, VARIANTS[name].hyperparameters, 10, order),
                {"avg_acc": score, "forgetting": 5.0, "new_acc": 65.0},
            )
    runs.add(
        ("roles", VARIANTS["roles"].hyperparameters, 11, "paper"), {"avg_acc": 0.0, "forgetting": 0.0, "new_acc": 0.0}
    )
    runs.add(("roles", {"scale": 1.0}, 12, "paper"), {"avg_acc": 99.0, "forgetting": 0.0, "new_acc": 99.0})
    (line,) = [line for line in ablate.table(runs).splitlines() if line.startswith("| `roles` |")]
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells == ["29.5 / 2.5 / 32.5", "51.5 / 5.0 / 65.0", "36.8 / 3.3 / 43.3", "+0.2", "1 of 2"]
