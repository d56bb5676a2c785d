"""Suites by name or path; orders by name, list or seed; errors list the valid names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training.toy import change

from cnext.cli import main
from cnext.config.run_config import RunConfig, plan
from cnext.errors import UserError
from cnext.tasks import suites

PAPER = ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("paper", PAPER),
        ("reverse", PAPER[::-1]),
        ("alphabet", ("Flickr30k", "HQEdit", "ImageNet", "OCRVQA", "RefCOCO", "VQAv2")),
        ("HQEdit,VQAv2", ("HQEdit", "VQAv2")),
    ],
    ids=["paper", "reverse", "alphabet", "list"],
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
    with pytest.raises(UserError, match=r"valid: paper, reverse, alphabet, random:K, or a list of: VQAv2,ImageNet"):
        suites.order(suites.load("next-tiny"), spec)


@pytest.mark.parametrize("name", suites.names())
def test_every_suite_can_be_planned(name: str, tmp_path: Path) -> None:
    """Its formats, scorers, modalities, orders and steps are known: what a run looks up before it reads a file."""
    suite = suites.load(name)
    for order in (*suite.orders, "reverse", "alphabet"):
        for preset in suite.budgets:
            planned = plan(RunConfig(suite=name, data=tmp_path, order=order, preset=preset, method="lora"))
            assert sorted(planned.order) == sorted(task.name for task in suite.tasks)
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
    paper = suite.budgets["paper"]
    assert paper == suite.budgets["default"]
    assert paper.steps == {**dict.fromkeys(PAPER, 3000), "HQEdit": 10_000}
    assert (paper.learning_rate, paper.betas, paper.eps, paper.weight_decay) == (1e-4, (0.9, 0.98), 1e-6, 0.05)
    assert suites.order(suite, "paper") == PAPER
    assert suites.order(suite, "appendix") == ("VQAv2", "ImageNet", "Flickr30k", "RefCOCO", "OCRVQA", "HQEdit")
    assert suites.order(suite, "appendix-reverse") == suites.order(suite, "appendix")[::-1]


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
