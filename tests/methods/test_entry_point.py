"""The documented example of a method in a package of its own: found, listed, run and resumed as one of ours."""

from __future__ import annotations

import importlib
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.sequence import Sequence

from cnext import RunConfig, methods, run
from cnext.cli import run_main
from cnext.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_method"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example as pip would install it: its module, and the metadata that its pyproject.toml declares."""
    declared = re.search(
        r"\[project\.entry-points\.\"(.+?)\"\]\n((?:.+ = .+\n)+)", (EXAMPLE / "pyproject.toml").read_text()
    )
    site = tmp_path / "site"
    metadata = site / "l2_lora-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: l2-lora\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{declared[1]}]\n{declared[2]}".replace('"', ""))
    shutil.copy(EXAMPLE / "l2_lora.py", site)
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    return site


def test_is_no_longer_than_it_is_said_to_be() -> None:
    assert len((EXAMPLE / "l2_lora.py").read_text().splitlines()) <= 40


def test_is_listed_by_the_command_line(installed: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "cnext", "list"],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"l2-lora +LoRA, held by a spring", listed)


def test_learns_and_resumes(installed: Path, data: Path) -> None:
    whole = Sequence("l2-lora", data, strength=0.1)
    whole.learn("VQAv2")
    whole.learn("HQEdit")
    first = Sequence("l2-lora", data, strength=0.1)
    first.learn("VQAv2")
    trainer = first.open("HQEdit")
    trainer.train_step()
    second = Sequence("l2-lora", data, strength=0.1)
    second.restore(first)
    again = second.open("HQEdit")
    second.method.load_state_dict(first.method.state_dict())
    again.load_state_dict(trainer.state_dict(), 1)
    while again.step < again.steps:
        again.train_step()
    second.method.after_task()
    states = whole.state(), second.state()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_runs_with_its_own_hyperparameter(installed: Path, data: Path, toy_suite: Path, tmp_path: Path) -> None:
    options = {"suite": str(toy_suite), "data": data, "order": "VQAv2,HQEdit", "out": tmp_path, "device": "cpu"}
    config = RunConfig(method="l2-lora", hyperparameters={"strength": 0.5}, **options)
    run(config)
    results = json.loads((config.folder / "results.json").read_text())
    assert (results["method"], results["hyperparameters"]["strength"], results["finished"]) == ("l2-lora", 0.5, True)


@pytest.mark.parametrize("module", ["gone", "gone.inside"])
def test_a_module_that_is_gone_is_named(installed: Path, module: str) -> None:
    registered = next(installed.glob("*.dist-info")) / "entry_points.txt"
    registered.write_text(f"[cnext.methods]\nl2-lora = {module}\n")
    importlib.invalidate_caches()
    assert methods.summary("l2-lora").endswith(f"no module {module}")
    with pytest.raises(UserError, match=f"l2-lora cannot be imported from {module}"):
        methods.load("l2-lora")


def test_a_class_may_be_named_beside_the_module(installed: Path) -> None:
    registered = next(installed.glob("*.dist-info")) / "entry_points.txt"
    registered.write_text("[cnext.methods]\nl2-lora = l2_lora:L2Lora\n")
    importlib.invalidate_caches()
    assert methods.load("l2-lora").__name__ == "L2Lora"
    assert methods.summary("l2-lora").startswith("LoRA, held by a spring")


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ('kind: Literal["a", "b"] = "a"', "--l2-lora.kind {a,b}"),
        ("sizes: tuple[int, ...] = (1, 2)", "--l2-lora.sizes [INT [INT ...]]"),
        ("most: float = 2 * 8.0", "--l2-lora.most FLOAT"),
        ("most: float = field(default=16.0)", "--l2-lora.most FLOAT"),
    ],
    ids=["choice", "several", "no literal", "field"],
)
def test_a_field_that_the_source_alone_does_not_tell_is_a_flag_too(
    field: str, shown: str, installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (installed / "l2_lora.py").read_text()
    imports = "from dataclasses import dataclass, field\nfrom typing import Literal\n"
    source = source.replace("from dataclasses import dataclass\n", imports)
    source = source.replace(
        "    strength: float = 0.001", f'    {field}\n    """What it says."""\n    strength: float = 0.001'
    )
    (installed / "l2_lora.py").write_text(source)
    monkeypatch.delitem(sys.modules, "l2_lora", raising=False)
    linecache.clearcache()
    with pytest.raises(SystemExit) as stop:
        run_main(["--method", "l2-lora", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert shown in told
    assert "What it says." in told
    assert "--l2-lora.strength FLOAT" in told


def test_a_name_of_ours_is_not_taken(installed: Path) -> None:
    """Results that say mage are of ours."""
    next(installed.glob("*.dist-info")).joinpath("entry_points.txt").write_text("[cnext.methods]\nmage = l2_lora\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="a package registers a method as mage, which cnext has; it needs another name"):
        methods.load("mage")


def test_its_bad_values_are_one_message(installed: Path) -> None:
    with pytest.raises(UserError, match="strength must be at least 0, got -1"):
        methods.load("l2-lora")(strength=-1)
