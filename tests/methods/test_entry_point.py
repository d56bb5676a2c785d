"""The documented method in a package of its own: found, listed, run and resumed like a built-in one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from methods.sequence import TASKS, Sequence, resume, same

from cnext import RunConfig, example_method, methods, run
from cnext.cli import run_main
from cnext.errors import UserError

EXAMPLE = Path(example_method.__file__).parent


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


def test_is_listed_by_the_command_line(installed: Path, tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "cnext", "list"],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"l2-lora +LoRA with a penalty of equal strength", listed)


def test_a_resumed_run_ends_with_the_same_bits(installed: Path, data: Path) -> None:
    whole = Sequence("l2-lora", data)
    whole.learn(*TASKS)
    assert same(resume("l2-lora", data, 1).state(), whole.state())


def test_runs_with_its_own_hyperparameter(installed: Path, data: Path, toy_suite: Path, tmp_path: Path) -> None:
    options = {"suite": str(toy_suite), "data": data, "order": "VQAv2,HQEdit", "out": tmp_path, "device": "cpu"}
    config = RunConfig(method="l2-lora", hyperparameters={"strength": 0.5}, **options)
    run(config)
    results = json.loads((config.folder / "results.json").read_text())
    assert (results["method"], results["hyperparameters"]["strength"], results["finished"]) == ("l2-lora", 0.5, True)


def register(installed: Path, entry: str) -> None:
    next(installed.glob("*.dist-info")).joinpath("entry_points.txt").write_text(f"[cnext.methods]\n{entry}\n")
    importlib.invalidate_caches()


@pytest.mark.parametrize("module", ["gone", "gone.inside"])
def test_a_module_that_is_gone_is_named(installed: Path, module: str) -> None:
    register(installed, f"l2-lora = {module}")
    assert methods.summary("l2-lora").endswith(f"no module {module}")
    with pytest.raises(UserError, match=f"l2-lora cannot be imported from {module}"):
        methods.load("l2-lora")


def test_a_class_may_be_named_beside_the_module(installed: Path) -> None:
    register(installed, "l2-lora = l2_lora:L2Lora")
    assert methods.load("l2-lora").__name__ == "L2Lora"
    assert methods.summary("l2-lora").startswith("LoRA with a penalty")


@pytest.mark.parametrize(
    ("field", "shown", "imported"),
    [
        ('new: Annotated[int, "What it means."] = 2', "--l2-lora.new INT What it means. (default: 2)", False),
        ("new: int = 2", "--l2-lora.new INT (default: 2)", True),
        ('new: Annotated[Literal["a", "b"], "What it means."] = "a"', "--l2-lora.new {a,b} What it means.", True),
        ("new: tuple[int, ...] = (1, 2)", "--l2-lora.new [INT [INT ...]] (default: 1 2)", True),
        (
            'new: Annotated[float, "What it means."] = 2 * 8.0',
            "--l2-lora.new FLOAT What it means.",
            True,
        ),
        ("new: float = field(default=16.0)", "--l2-lora.new FLOAT (default: 16.0)", True),
        ("scale: float = 2.0", "--l2-lora.scale FLOAT Scaling factor of the branches' output", False),
        ("scale: float = 2 * 8.0", "--l2-lora.scale FLOAT Scaling factor of the branches' output", True),
    ],
    ids=["annotated", "plain", "choice", "several", "no literal", "field", "other default", "no literal default"],
)
def test_a_field_is_a_flag_whatever_its_form(
    field: str,
    shown: str,
    imported: bool,
    installed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read from the source if its form allows; else the module is imported."""
    source = (installed / "l2_lora.py").read_text()
    source = source.replace("import dataclass\n", "import dataclass, field\n")
    source = source.replace("import Annotated\n", "import Annotated, Literal\n")
    (installed / "l2_lora.py").write_text(source.replace("    strength:", f"    {field}\n    strength:"))
    monkeypatch.delitem(sys.modules, "l2_lora", raising=False)
    with pytest.raises(SystemExit) as stop:
        run_main(["--method", "l2-lora", "--help-all"])
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown in told
    assert "--l2-lora.strength FLOAT Weight of the penalty; 0 is plain LoRA. (default: 0.001)" in told
    assert ("l2_lora" in sys.modules) == imported


@pytest.mark.parametrize("source", ["class Broken(", "raise ImportError"], ids=["syntax", "import"])
def test_a_broken_module_is_one_message(source: str, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / "l2_lora.py").write_text(source)
    monkeypatch.delitem(sys.modules, "l2_lora", raising=False)
    with pytest.raises(UserError, match="the method l2-lora cannot be imported from l2_lora: "):
        methods.declared("l2-lora")


def test_its_bad_values_are_one_message(installed: Path) -> None:
    with pytest.raises(UserError, match="strength must be at least 0, got -1"):
        methods.load("l2-lora")(strength=-1)


def installed_by_pip(folder: Path, site: Path) -> dict[str, str]:
    """Installs a package without the network. Returns the environment of a process that finds it."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    subprocess.run([*install, "--target", site, folder], check=True, env=os.environ | quiet)
    return os.environ | {"PYTHONPATH": str(site)}


def test_a_copy_under_another_name_is_installed_and_passes_its_own_test(tmp_path: Path) -> None:
    """`cnext new-method`, pip, pytest and `cnext card`, as its last line says."""
    cnext = [sys.executable, "-m", "cnext"]
    said = subprocess.run([*cnext, "new-method", "near-lora"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "pip install -e near-lora && pytest near-lora && cnext card near-lora"
    folder = tmp_path / "near-lora"
    assert {path.name for path in folder.iterdir()} == {"near_lora.py", "test_near_lora.py", "pyproject.toml"}
    assert not re.search(r"l2.?lora", "".join(path.read_text() for path in folder.iterdir()), re.IGNORECASE)
    environment = installed_by_pip(folder, tmp_path / "site")
    shown = subprocess.run([*cnext, "card", "near-lora"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "--near-lora.strength (default 0.001)" in shown.stdout, shown.stderr
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    tested = subprocess.run(tests, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in tested.stdout, tested.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mage", "there is a method mage already; choose another name"),
        ("My_Method", "expected a name such as my-method, .* got 'My_Method'"),
        ("torch", "there is a module torch already, which torch would hide; choose another name"),
        ("json", "there is a module json already"),
        ("sys", "there is a module sys already"),
        ("cnext", "there is a module cnext already"),
        ("a" * 61, "expected a name of at most 60 letters, got 61"),
        ("../x", "expected a name such as my-method"),
        ("import", "expected a name such as my-method"),
        ("there", "there is there already; remove it, or name another folder with --out"),
    ],
)
def test_names_and_folders_that_cannot_be_are_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=message):
        example_method.write(name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
