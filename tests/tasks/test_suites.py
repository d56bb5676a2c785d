"""Suites by name or path, orders by name, list or seed; unknown names list the valid ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_unknown_suites_list_the_valid() -> None:
    with pytest.raises(UserError, match="unknown suite 'coin'; valid: next-tiny"):
        suites.load("coin")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("[]", "must be a JSON object"),
        ("{}", "needs 'tasks'"),
        ('{"tasks": ["A"]}', "cannot read"),
    ],
    ids=["cut", "list", "empty", "no task file"],
)
def test_bad_manifests_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        suites.load(str(tmp_path))


def test_an_unknown_field_of_a_task_is_named(toy_suite: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text((toy_suite / "suite.json").read_text())
    for name in PAPER:
        (tmp_path / f"{name}.json").write_text(
            json.dumps(json.loads((toy_suite / f"{name}.json").read_text()) | {"reeds": []})
        )
    with pytest.raises(UserError, match="reeds"):
        suites.load(str(tmp_path))
