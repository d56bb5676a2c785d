"""Suites by name or path; orders by name, list or seed; errors list the valid names."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from training.toy import change

from cnext import methods
from cnext.cli import main, run_main
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.scoring import published
from cnext.studies.flags import configs, parse
from cnext.tasks import suites

PAPER = ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("paper", PAPER),
        ("reverse", PAPER[::-1]),
        ("alphabet", ("Flickr30k", "HQEdit", "ImageNet", "OCRVQA", "RefCOCO", "VQAv2")),
        ("interleaved", ("VQAv2", "Flickr30k", "ImageNet", "HQEdit", "OCRVQA", "RefCOCO")),
        ("HQEdit,VQAv2", ("HQEdit", "VQAv2")),
    ],
    ids=["paper", "reverse", "alphabet", "interleaved", "list"],
)
def test_orders(spec: str, expected: tuple[str, ...]) -> None:
    assert suites.order(suites.load("next-tiny"), spec) == expected


def test_random_orders_are_seeded_shuffles() -> None:
    suite = suites.load("next-tiny")
    drawn = [suites.order(suite, f"random:{seed}") for seed in range(5)]
    assert all(sorted(order) == sorted(PAPER) for order in drawn)
    assert len(set(drawn)) > 1
    assert drawn[3] == suites.order(suite, "random:3")


@pytest.mark.parametrize("spec", ["backwards", "VQAv2,VQAv2", "VQAv2,COCO", "random:x", ""])
def test_unknown_orders_list_the_valid(spec: str) -> None:
    with pytest.raises(
        UserError, match=r"valid: paper, interleaved, reverse, alphabet, random:K, or a list of: VQAv2,ImageNet"
    ):
        suites.order(suites.load("next-tiny"), spec)


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_can_be_planned(name: str, tmp_path: Path) -> None:
    """Its formats, scorers, modalities, orders and steps are known: what a run looks up before it reads a file."""
    suite = suites.load(name)
    for order in (*suite.orders, "reverse", "alphabet"):
        for preset in suite.budgets:
            planned = plan(RunConfig(suite=name, data=tmp_path, order=order, preset=preset, method="lora"))
            assert sorted(planned.order) == sorted(task.name for task in suite.tasks)
            for method in suite.budgets[preset].hyperparameters:
                plan(RunConfig(suite=name, data=tmp_path, order=order, preset=preset, method=method))
    assert all(budget in suites.summary(suite) for budget in suite.budgets)
    assert all(task.test in suites.details(suite) for task in suite.tasks)


def test_the_papers_suite_has_the_printed_values() -> None:
    """Sizes as printed in appendix 9.1, steps and optimizer as in the released scripts, both orders as printed."""
    suite = suites.load("continual-next")
    sizes = {task.name: (task.train_count, task.test_count) for task in suite.tasks}
    assert sizes == {
        "VQAv2": (82_783, 5_000),
        "ImageNet": (129_833, 5_050),
        "Flickr30k": (30_783, 1_000),
        "OCRVQA": (164_948, 5_000),
        "RefCOCO": (53_700, 5_000),
        "HQEdit": (8_813, 1_000),
    }
    assert {name: recipe.draws for name, recipe in suite.budgets.items()} == {
        "paper": "sample", "released": "epoch", "default": "sample", "smoke": "sample",
    }  # fmt: skip
    paper = suite.budgets["paper"]
    assert paper == suite.budgets["default"]
    assert paper.steps == {**dict.fromkeys(PAPER, 3000), "HQEdit": 10_000}
    assert (paper.learning_rate, paper.betas, paper.eps, paper.weight_decay) == (1e-4, (0.9, 0.98), 1e-6, 0.05)
    assert suites.order(suite, "paper") == PAPER
    assert suites.order(suite, "appendix") == ("VQAv2", "ImageNet", "Flickr30k", "RefCOCO", "OCRVQA", "HQEdit")
    assert suites.order(suite, "appendix-reverse") == suites.order(suite, "appendix")[::-1]


def test_the_papers_presets_have_the_papers_scale(tmp_path: Path) -> None:
    kept = {"ewc": ("penalty", 0.01), "lae": ("decay", 0.99), "cia": ("factor", 2.0), "lora": ("lr_factor", 1.0)}
    for preset in ("paper", "released", "default"):
        for method in methods_of_the_paper():
            given = RunConfig(suite="continual-next", data=tmp_path, preset=preset, method=method)
            hyperparameters = plan(given).hyperparameters
            assert hyperparameters["scale"] == 1.0
            name, value = kept.get(method, ("dropout", 0.05 if preset == "released" else 0.0))
            assert hyperparameters[name] == value
        given = RunConfig(suite="continual-next", data=tmp_path, preset=preset, method="mage")
        assert plan(given).hyperparameters == dataclasses.asdict(methods.load("mage")())


def test_a_presets_option_of_another_averaging_rule_is_left_out(tmp_path: Path) -> None:
    """C of `paper` is of the rule pema: with the paper's own equation it has no effect, and does not stop the run."""
    flags = ["--suite", "continual-next", "--data", str(tmp_path), "--method", "mage-paper"]
    own = methods.load("mage-paper")()
    for more, expected in (
        ([], ("pema", 5.0)),
        (["--preset", "released"], ("none", own.c)),
        (["--mage-paper.average", "pema-literal"], ("pema-literal", own.c)),
        (["--mage-paper.average", "pema-kron"], ("pema-kron", 5.0)),
        (["--mage-paper.c", "3"], ("pema", 3.0)),
    ):
        [given] = configs(parse([*flags, *more]))
        found = plan(given).hyperparameters
        assert (found["average"], found["c"]) == expected
    [given] = configs(parse([*flags, "--mage-paper.average", "none", "--mage-paper.c", "3"]))
    with pytest.raises(UserError, match=re.escape("c=3.0 has no effect with the averaging rule none")):
        plan(given)


def methods_of_the_paper() -> set[str]:
    return published.continual_next()["methods"].keys() - {"zero-shot"}


def test_a_presets_hyperparameters(toy_suite: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They are the flags' defaults and what --help shows; given ones go first; config.json has the result alone."""
    folder = tmp_path / "own"
    shutil.copytree(toy_suite, folder)
    budgets = json.loads((folder / "suite.json").read_text())["budgets"]
    budgets["default"]["hyperparameters"] = {"ewc": {"scale": 2.5, "penalty": 0.5}}
    change(folder / "suite.json", budgets=budgets)
    shared = {"suite": str(folder), "data": data, "method": "ewc"}
    planned = plan(RunConfig(**shared, hyperparameters={"penalty": 0.25}))
    assert (planned.hyperparameters["scale"], planned.hyperparameters["penalty"]) == (2.5, 0.25)
    assert "hyperparameters" not in planned.as_dict()["recipe"]
    flags = ["--suite", str(folder), "--data", str(data), "--method", "ewc"]
    for more, expected in (([], (2.5, 0.5)), (["--ewc.scale", "1"], (1.0, 0.5))):
        [given] = configs(parse([*flags, *more]))
        found = plan(given).hyperparameters
        assert (found["scale"], found["penalty"]) == expected
    with pytest.raises(SystemExit):
        parse([*flags, "--help"])
    assert re.search(r"--ewc.scale FLOAT.*?\(default:\s*2\.5\)", capsys.readouterr().out, re.DOTALL)
    assert "hyperparameters of default: scale 2.5, penalty 0.5 for ewc" in suites.details(suites.load(str(folder)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ewcc": {"scale": 1.0}}, "unknown method in suite.json (preset default) 'ewcc'; valid: "),
        ({"ewc": {"scala": 1.0}}, "unknown hyperparameter of ewc 'scala'; valid: rank, scale, "),
        ({"ewc": {"scale": "big"}}, "hyperparameter scale of ewc must be of type float"),
        ({"ewc": {"penalty": -1.0}}, "ewc: expected a finite penalty of at least 0, got -1.0"),
        ({"ewc": 1.0}, "Expected `object`"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_hyperparameters_of_a_preset(
    given: dict, message: str, toy_suite: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(toy_suite, folder)
    budgets = json.loads((folder / "suite.json").read_text())["budgets"]
    budgets["default"]["hyperparameters"] = given
    change(folder / "suite.json", budgets=budgets)
    with pytest.raises(UserError, match=re.escape(message)):
        plan(RunConfig(suite=str(folder), data=data, method="ewc"))
    flags = ["--suite", str(folder), "--data", str(data), "--method", "ewc", "--dry-run"]
    assert run_main(flags) == 2


def test_consistent_prompts_give_another_suite(tmp_path: Path) -> None:
    released, consistent = (
        plan(RunConfig(suite="continual-next", data=tmp_path, prompts=prompts, method="lora"))
        for prompts in ("released", "consistent")
    )
    assert released.suite == suites.load("continual-next")
    assert {task.name for task in consistent.suite.tasks if task.prompts == "consistent"} == {"Flickr30k", "HQEdit"}
    assert consistent.as_dict()["suite"] == "continual-next-consistent"
    assert plan(RunConfig(suite="coin", data=tmp_path, prompts="consistent")).suite.name == "coin"
    with pytest.raises(UserError, match=r"unknown prompts .* 'consistant'; valid: released, consistent"):
        plan(RunConfig(suite="continual-next", data=tmp_path, prompts="consistant"))


def test_a_suite_has_a_name_and_budgets_may_be_aliases(toy_suite: Path, tmp_path: Path) -> None:
    folder = tmp_path / "anything"
    shutil.copytree(toy_suite, folder)
    budgets = json.loads((folder / "suite.json").read_text())["budgets"]
    change(folder / "suite.json", name="small", budgets=budgets | {"paper": "default"})
    suite = suites.load(str(folder))
    assert suite.name == "small"
    assert suite.budgets["paper"] == suite.budgets["default"]
    change(folder / "suite.json", budgets={})
    with pytest.raises(UserError, match=r"suite small has no preset; add one to budgets in its suite\.json"):
        plan(RunConfig(suite=str(folder)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"suite\.json: expected JSON, could not read it"),
        ("[]", "Expected `object`, got `array`; correct the manifest"),
        ("{}", "missing required field `tasks`"),
        ('{"tasks": ["A"], "orders": {}, "budgets": {}}', r"A\.json: expected JSON, could not read it"),
    ],
    ids=["cut", "list", "empty", "no task file"],
)
def test_bad_manifests_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        suites.load(str(tmp_path))


@pytest.mark.parametrize(
    ("modalities", "reason"),
    [
        (["text", "image", ""], "Expected a name of lowercase letters, digits and underscores, got ''"),
        (["general.x"], "Expected a name of lowercase letters, digits and underscores, got 'general.x'"),
        (["text", "text"], "Expected distinct modalities, at least one, got text, text"),
        ([], "Expected distinct modalities, at least one, got none"),
    ],
)
def test_bad_modalities_are_of_the_suite(
    toy_suite: Path, tmp_path: Path, modalities: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(toy_suite, folder)
    change(folder / "suite.json", modalities=modalities)
    assert main(["data", "check", str(tmp_path), "--suite", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/suite.json: {reason}" in said
    assert "task" not in said.partition("suite.json")[2]


def test_an_unknown_field_of_a_task_is_named(toy_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text((toy_suite / "suite.json").read_text())
    for name in PAPER:
        shutil.copy(toy_suite / f"{name}.json", tmp_path)
        change(tmp_path / f"{name}.json", reeds=[])
    with pytest.raises(UserError, match="reeds"):
        suites.load(str(tmp_path))
