"""A warning fails a test where all libraries are tested versions; a newer one's deprecations are shown and counted."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tested_versions
from packaging.version import Version
from tested_versions import FILE, newer, pinned

ROOT = Path(__file__).parents[1]
TESTS = """
import warnings
import pytest

@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning, UserWarning])
def test_deprecated(category):
    warnings.warn("past is deprecated, use future", category)

@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning])
def test_anything_else(category):
    warnings.warn("dividing by zero", category)
"""


def run(folder: Path, versions: str) -> str:
    """pytest's last lines on TESTS, with this repository's configuration and these versions tested."""
    (folder / "tested.txt").write_text(versions)
    (folder / "test_warnings.py").write_text(TESTS)
    (folder / "conftest.py").write_text(
        "from pathlib import Path\n"
        "import tested_versions\n"
        "def pytest_configure(config):\n"
        "    tested_versions.configure(config, Path(__file__).with_name('tested.txt'))\n"
        "def pytest_report_header():\n"
        "    return tested_versions.header(Path(__file__).with_name('tested.txt'))\n"
    )
    text = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text.replace('"tests", "bench"', f'"{ROOT / "tests"}"'))
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "test_warnings.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def versions(**other: str) -> str:
    """A file of tested versions: those installed, but for these."""
    listed = {name: importlib.metadata.version(name) for name in ("torch", "numpy")} | other
    python = listed.pop("python", platform.python_version())
    return "\n".join(
        [f"# Python {python} on this machine", *(f"{name}=={version}" for name, version in listed.items())]
    )


@pytest.mark.parametrize(
    "other", [{}, {"numpy": "999.0"}, {"not-installed": "1.0"}], ids=["the same", "an older one here", "one not here"]
)
def test_every_warning_fails_with_tested_versions(tmp_path: Path, other: dict[str, str]) -> None:
    said = run(tmp_path, versions(**other))
    assert "libraries: none newer than tested, so every warning is an error" in said
    assert re.search(r"7 failed in", said), said


@pytest.mark.parametrize("other", [{"numpy": "1.0"}, {"python": "3.9.1"}], ids=["library", "python"])
def test_deprecations_of_newer_libraries_are_counted(tmp_path: Path, other: dict[str, str]) -> None:
    said = run(tmp_path, versions(**other))
    (name, version), *_ = other.items()
    assert re.search(rf"libraries newer than tested, .*: {name} [\d.]+ \({re.escape(version)}\)", said), said
    assert re.search(r"3 failed, 4 passed, 4 warnings in", said), said


def test_the_file_has_what_cnext_and_its_tests_require() -> None:
    pins = pinned(FILE)
    required = [
        r.split(";")[0] for r in importlib.metadata.requires("cnext") or [] if not re.search('"(check|docs)"', r)
    ]
    names = {re.split(r"[^\w.-]", requirement.strip())[0].lower().replace("_", "-") for requirement in required}
    assert names - {"cnext"} <= {name.lower().replace("_", "-") for name in pins}
    assert all(str(Version(version)) for version in pins.values())


def test_a_local_version_is_no_newer_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tested.txt").write_text(f"# Python {platform.python_version()}\ntorch==2.13.0\n")
    monkeypatch.setattr(tested_versions.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert newer(tmp_path / "tested.txt") == {}
