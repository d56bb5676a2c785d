"""Which cnext is used from a source tree: the installed one, unless the tree itself is installed with -e."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHERE = """
import subprocess, sys
from pathlib import Path

def test_where(tmp_path):
    import cnext

    command = [sys.executable, "-c", "import cnext; print(cnext.__file__)"]
    child = subprocess.check_output(command, cwd=tmp_path, text=True)
    for file in (cnext.__file__, child.strip()):
        assert Path(__file__).parents[1] not in Path(file).parents
"""
USED = """
import json, site, sys
site.addsitedir("installed")
sys.meta_path.insert(0, sys.meta_path.pop())  # before the cnext that is installed for these tests
import cnext.kernels.averaging
import torch
from cnext.backbones.tiny.model import TinyBackbone
from cnext.ops import dispatch, sums

TinyBackbone.load()
sums([torch.ones(3)], impl="cpp")
files = cnext.__file__, cnext.kernels.averaging.__file__, dispatch.core("cpp").__file__
print(json.dumps({"files": files, "cuda": dispatch.missing("cuda", "cuda")}))
"""
BUILT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree as it is checked out: of the package what makes it one."""
    made = tmp_path / "tree"
    for folder in ("cnext", "bench", "tests", "csrc"):
        (made / folder).mkdir(parents=True)
    for file in ("setup.py", "pyproject.toml", "conftest.py", "bench/tune.py"):
        shutil.copy(ROOT / file, made / file)
    (made / "cnext/__init__.py").write_text("raise SystemExit('this is the source tree')\n")
    (made / "tests/test_where.py").write_text(WHERE)
    return made


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH"))}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=folder, env=kept | environment, capture_output=True, text=True)


@pytest.mark.parametrize("start", ["module", "program", "elsewhere", "path"])
def test_tests_are_of_the_installed_package_from_any_folder(start: str, tree: Path, tmp_path: Path) -> None:
    program = Path(pytest.__file__).parent / "__main__.py"
    folder, command, environment = {
        "module": (tree, ("-m", "pytest"), {}),
        "program": (tree, (program,), {}),
        "elsewhere": (tmp_path, ("-m", "pytest", tree / "tests"), {}),
        "path": (tmp_path, ("-m", "pytest", tree / "tests"), {"PYTHONPATH": str(tree)}),
    }[start]
    done = run(folder, *command, "-q", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_tests_without_an_installed_package_end_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", str(ROOT), str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"cnext is not installed in .*: pip install '.\[test\]', or pip install -e"):
        runpy.run_path(str(ROOT / "conftest.py"))
    assert sys.path == [str(tmp_path)]


def test_tuning_runs_the_installed_package(tree: Path) -> None:
    done = run(tree, "bench/tune.py", "--out", "bench", "--method", "mage", "--jobs", "1")
    assert done.returncode == 2
    assert "error: expected a file for the runs, bench is a folder" in done.stderr


def test_what_a_source_tree_runs_on_is_said(tree: Path) -> None:
    shutil.rmtree(tree / "cnext")
    shutil.copytree(ROOT / "cnext", tree / "cnext", ignore=BUILT)
    code = "import torch; from cnext import ops; print(ops.sums([torch.ones(3)]).item())"
    done = run(tree, "-c", code)
    assert done.stdout.split() == ["3.0"]
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"this is the source tree in {tree}, imported without being installed" in done.stderr


@pytest.mark.slow
def test_an_editable_install_builds_and_finds_everything(tmp_path: Path) -> None:
    """By what pip calls, so that no network is needed."""
    made = tmp_path / "tree"
    for folder in ("cnext", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, made / folder, ignore=BUILT)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, made / file)
    done = run(made, "-c", "from setuptools import build_meta; build_meta.build_editable('.')", CNEXT_CUDA="0")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    used = run(tmp_path, "-W", "error::RuntimeWarning:cnext", "-c", USED)
    assert used.returncode == 0, used.stderr
    told = json.loads(used.stdout)
    assert all(made in Path(file).parents for file in told["files"])
    assert told["cuda"].startswith(
        "cnext was built without it: CNEXT_CUDA=0 skipped it; install a CUDA toolkit of version 12.1 or newer, then"
    )
