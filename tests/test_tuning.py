"""Tuning: trials are runs to the bit, every method gets the same budget, and an interrupted program continues."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import tune
from trials import Trials

from cnext import RunConfig, methods, run
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.tasks import suites


def test_a_trial_has_the_metrics_of_a_run(data: Path, toy_suite: Path, tmp_path: Path) -> None:
    config = RunConfig(suite=str(toy_suite), data=data, split="validation")
    trials = Trials(config)
    for method, hyperparameters in (("mage", {"c": 2.0}), ("replay", {}), ("upper-bound", {}), ("mage", {"c": 2.0})):
        given = {"method": method, "hyperparameters": hyperparameters, "seed": 3, "order": "reverse"}
        whole = run(dataclasses.replace(config, **given, out=tmp_path / f"{method}"))["metrics"]
        metrics = trials.run(method, hyperparameters, 3, "reverse", learnt=method != "upper-bound")
        assert metrics == pytest.approx({name: whole[name] for name in metrics}, rel=1e-12)


def test_every_method_has_as_many_settings() -> None:
    counts = {name: len(tune.grid(name)) for name in methods.modules()}
    assert {name for name, count in counts.items() if count != 12} == {"zero-shot"}
    for name in methods.modules():
        for settings in tune.grid(name):
            plan(RunConfig(method=name, hyperparameters=settings))


def test_the_defaults_are_what_was_chosen() -> None:
    """By the program, from the runs in the file, with every run of the protocol there."""
    table = tune.Table(tune.RESULTS / "next-tiny" / "tuning.json")
    assert set(table.methods) == {name for name in methods.modules() if tune.grid(name) != [{}]}
    for name, found in table.methods.items():
        wanted = [run for rung in tune.rungs(table, name) for run in rung]
        assert all(table.score(*run) is not None for run in wanted)
        assert len(found["runs"]) == len(wanted) == 21
        kept, table.write = dict(found), lambda: None
        assert table.choose(name) == kept["chosen"]
        defaults = dataclasses.asdict(methods.load(name)())
        assert {key: defaults[key] for key in kept["chosen"]} == kept["chosen"], name


def test_the_presets_of_next_real_are_what_was_chosen() -> None:
    """By six runs of each method that the reference results have, of which the suite's presets take what was chosen."""
    table = tune.Table(tune.RESULTS / "next-real" / "tuning.json", coarse=True)
    assert set(table.methods) == {"lora", "ewc", "o-lora", "replay", "mage", "mage-experts", "upper-bound"}
    chosen = {}
    for name, found in table.methods.items():
        wanted = [run for rung in tune.rungs(table, name) for run in rung]
        assert all(table.score(*run) is not None for run in wanted)
        assert len(found["runs"]) == len(wanted) == 6
        chosen[name], table.write = found["chosen"], lambda: None
        assert table.choose(name) == chosen[name]
    assert all(preset.hyperparameters == chosen for preset in suites.load("next-real").budgets.values())
    readme = (table.path.parent / "README.md").read_text(encoding="utf-8")
    for name, found in sorted(table.methods.items(), key=lambda one: -one[1]["mean"]):
        values = ", ".join(f"{key} {value:g}" for key, value in found["chosen"].items())
        assert f"| `{name}` | {values} | {found['mean']:.1f} |" in readme


def test_a_coarse_table_has_six_runs_of_each_and_chooses_by_them(tmp_path: Path) -> None:
    pool, table = Fake(), tune.Table(tmp_path / "tuning.json", coarse=True)
    tune.one(pool, table, "ewc")
    assert len(pool.ran) == 6
    assert {(scale, *where) for scale, _, *where in pool.ran} == {(scale, *tune.FIRST) for scale in (1, 3, 6)}
    assert table.methods["ewc"]["chosen"]["scale"] == 6
    for name in methods.modules():
        assert len(tune.grid(name, coarse=True)) == 6 or name == "zero-shot", name


def test_a_penalty_grows_as_the_squared_scale() -> None:
    assert {"scale": 3.0, "penalty": pytest.approx(0.09)} in tune.grid("ewc")


class Fake:
    """In place of a pool: Avg.ACC by a formula; records what was run."""

    def __init__(self, broken_after: int = 10**6) -> None:
        self.ran: list[tuple] = []
        self.left = broken_after

    def submit(self, _, method, settings, seed, order):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.ran.append((settings["scale"], settings["penalty"], seed, order))
        # Best at scale 6 with the first seed alone; scales 1 and 3 are level over all four runs.
        score = {1: 50.0, 3: 50.2, 6: 51.0 if (seed, order) == tune.FIRST else 40.0}[settings["scale"]]
        done: Future[dict[str, float]] = Future()
        done.set_result({"avg_acc": score - abs(settings["penalty"] / settings["scale"] ** 2 - 0.01) * 1000})
        return done


def test_a_run_that_fails_is_shown_at_once_and_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(_, table: tune.Table, name: str) -> None:
        if name == "lora":
            raise UserError("lora failed")

    monkeypatch.setattr(tune, "one", one)
    with pytest.raises(UserError, match="lora failed"):
        tune.tune(["lora", "ewc"], tune.Table(tmp_path / "runs.json"), "next-tiny", "smoke", jobs=1)
    assert capsys.readouterr().err == "lora: lora failed\n"


def test_the_budget_the_choice_and_a_resumed_table(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    pool = Fake(broken_after=15)
    with pytest.raises(KeyboardInterrupt):
        tune.one(pool, tune.Table(file), "ewc")
    assert len(json.loads(file.read_text())["ewc"]["runs"]) == 12
    again = Fake()
    tune.one(again, tune.Table(file), "ewc")
    ran = pool.ran[:12] + again.ran
    assert len(ran) == len(set(ran)) == 21
    assert {where[2:] for where in ran[:12]} == {(10, "paper")}
    finalists = {(scale, penalty) for scale, penalty, *where in ran[12:]}
    assert finalists == {(1.0, 0.01), (3.0, 0.09), (6.0, 0.36)}
    table = json.loads(file.read_text())["ewc"]
    assert len(table["runs"]) == 21
    assert table["chosen"] == {"scale": 1.0, "penalty": 0.01}, "within half a point, the smaller scale"
    assert table["mean"] == pytest.approx(50.0)
