"""What is distributed: an sdist with all that the repository has, and wheels as cibuildwheel is told to make them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import cnext

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_SHIPPED = {".gitignore"}
MADE = {"PKG-INFO", "setup.cfg"}


def tracked() -> set[str]:
    """The repository's files by git; in an unpacked sdist, those that it lists."""
    if (ROOT / ".git").exists():
        words = "ls-files -z --cached --others --exclude-standard"
        command = ["git", "-c", f"safe.directory={ROOT}", *words.split()]
        listed = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
        return {name for name in listed if name and (ROOT / name).is_file()}
    listed = (ROOT / "cnext.egg-info/SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return {name for name in listed if not name.startswith("cnext.egg-info/")} - MADE


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy with files as builds and editors leave them, by what pip calls."""
    copy = tmp_path_factory.mktemp("sdist") / "tree"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for name in ("cnext/_cpu.so", "cnext/_build.json", "cnext/__pycache__/x.pyc", "runs/x/results.json", "build/x.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist" / done.stdout.splitlines()[-1]


def test_the_sdist_has_what_the_repository_has(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    found = {name for name in names if not name.startswith("cnext.egg-info/")} - MADE
    assert found == tracked() - NOT_SHIPPED
    assert found >= {"SECURITY.md", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "docs/index.md", ".ci/run"}


def test_the_metadata_names_what_can_be_looked_up(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        member = next(one for one in archive if one.name.count("/") == 1 and one.name.endswith("/PKG-INFO"))
        file = archive.extractfile(member)
        assert file is not None
        text = file.read().decode()
    assert "Project-URL: Paper, https://arxiv.org/abs/2602.18055" in text
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {PROJECT['project']['version']}\n" in citation
    assert f"url: {PROJECT['project']['urls']['Paper']}\n" in citation
    code = (ROOT / "cnext/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in code


def test_a_wheel_of_the_cpp_part_has_at_most_ten_megabytes() -> None:
    """By the files that it has, each compressed as wheels compress them."""
    names = {name for name in tracked() if name.startswith(("cnext/", "kernels/triton/"))}
    built = [*Path(cnext.__file__).parent.glob("_cpu*.so")]
    assert built
    sizes = {path: len(zlib.compress(path.read_bytes(), 6)) for path in [*(ROOT / name for name in names), *built]}
    assert sum(sizes.values()) < 1e7, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_wheels_are_built_for_every_python_that_is_declared() -> None:
    wheels, project = PROJECT["tool"]["cibuildwheel"], PROJECT["project"]
    built = {re.fullmatch(r"cp3(\d+)-\*", one)[1] for one in wheels["build"]}  # pyright: ignore[reportOptionalSubscript]
    declared = {line.rpartition(".")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert built == declared
    supported = SpecifierSet(project["requires-python"])
    assert all(f"3.{minor}" in supported for minor in built)
    assert f"3.{min(map(int, built)) - 1}" not in supported


def test_wheels_have_the_part_that_runs_everywhere_and_torchs_openmp() -> None:
    wheels = PROJECT["tool"]["cibuildwheel"]
    assert wheels["environment"] == {"CNEXT_CUDA": "0"}
    assert "impl='cpp'" in wheels["test-command"]
    assert "--exclude libgomp.so.1" in wheels["linux"]["repair-wheel-command"]
    assert (wheels["linux"]["archs"], wheels["macos"]["archs"]) == (["x86_64", "aarch64"], ["arm64"])
    import torch

    if sys.platform == "linux":
        assert (Path(torch.__file__).parent / "lib/libgomp.so.1").is_file()


def test_what_builds_is_what_the_tests_build_with() -> None:
    needed = {Requirement(one).name for one in PROJECT["build-system"]["requires"]}
    tests = {Requirement(one).name for one in PROJECT["project"]["optional-dependencies"]["test"]}
    assert needed <= tests
