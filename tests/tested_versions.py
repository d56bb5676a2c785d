"""Find libraries newer than the tested ones, and let their deprecation warnings pass.

With the versions of ``tested-versions.txt``, or older ones, every warning fails a test. A newer library may
deprecate things: pytest then shows and counts the deprecations, and no test fails because of them, so that the tests
still pass on a newly set up machine.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import pytest
from packaging.version import Version

FILE = Path(__file__).with_name("tested-versions.txt")
DEPRECATIONS = (
    "default::DeprecationWarning",
    "default::PendingDeprecationWarning",
    "default::FutureWarning",
    "default:.*deprecat:UserWarning",
)


def pinned(file: Path) -> dict[str, str]:
    """The versions by distribution, and Python's own as "python", from a file that `bench/versions.py record` wrote."""
    return dict(
        re.findall(r"^(?:# )?([\w.-]+)(?:==| )([\d.]\S*)", file.read_text(encoding="utf-8").lower(), re.MULTILINE)
    )


def newer(file: Path) -> dict[str, str]:
    """What is installed in a newer version than tested: distribution to "installed (tested)". Of Python, minor ones."""
    found = {}
    for name, version in pinned(file).items():
        try:
            here = platform.python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        parts = 2 if name == "python" else None
        if Version(here).release[:parts] > Version(version).release[:parts]:
            found[name] = f"{here} ({version})"
    return found


def configure(config: pytest.Config, file: Path = FILE) -> None:
    """Keep deprecations from failing tests where a library is newer than tested."""
    for line in DEPRECATIONS if newer(file) else ():
        config.addinivalue_line("filterwarnings", line)


def header(file: Path = FILE) -> str:
    """What pytest says of it before the first test."""
    found = newer(file)
    if not found:
        return "libraries: none newer than tested, so every warning is an error"
    listed = ", ".join(f"{name} {versions}" for name, versions in found.items())
    return f"libraries newer than tested, whose deprecations are shown and fail nothing: {listed}"
