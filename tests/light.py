"""A child process as it is in a plain installation, `pip install cnext`: what only extras install is not there."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

CHILD = """
import importlib.metadata, json, sys
modules, names = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(modules)  # importing one is then a ModuleNotFoundError
real = importlib.metadata.version

def version(name):
    if name.lower().replace("_", "-") in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
del sys.argv[1]
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(name: str, extra: str = "") -> set[str]:
    """A distribution and all that it requires here, by normalized names; with one of its extras, what that installs."""
    found: set[str] = set()
    waiting = [(normal(name), extra)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, lines):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                waiting += [(normal(one.name), part) for part in ("", *one.extras)]
    return {name for name, _ in found}


def absent(more: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Modules and distributions that are installed here and not by cnext alone, and these besides."""
    core = required("cnext") - {*more}
    modules = importlib.metadata.packages_distributions()
    outside = [name for name, owners in modules.items() if not {normal(one) for one in owners} & core]
    names = {normal(one) for owners in modules.values() for one in owners} - core
    return sorted({*outside} - {*sys.stdlib_module_names, "__pycache__"}), sorted(names)


def run(code: str, *arguments: object, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program with these arguments in a plain installation that lacks these packages besides."""
    command = [sys.executable, "-c", CHILD + code, json.dumps(absent(without)), *map(str, arguments)]
    # Not where this process is: in a checkout the child would import the source tree, in which nothing is compiled.
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
