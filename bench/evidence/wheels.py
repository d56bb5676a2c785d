"""Wheels for a machine without a network: cnext itself, and what it and its tests need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[2]
WITH_A_GPU = ("torch", "torchvision", "triton")
"""Assumed to be on a machine with a GPU, as are CUDA's libraries: gigabytes that must match its driver."""
TESTS = ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis")
"""Needed by the part "tests" besides cnext."""


def canonical(name: str) -> str:
    """A distribution's name as the package index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(wheel: Path, marker_environment: dict[str, str]) -> Iterator[str]:
    """The requirements of a wheel, without those of its extras and of other systems."""
    from packaging.requirements import Requirement

    with ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({**marker_environment, "extra": ""}):
            requirement.marker = None
            yield str(requirement)


def collect(folder: Path, python: str, have: Path | None) -> None:
    """Builds and downloads wheels into ``folder``, and prints how to install them.

    Args:
        python: the interpreter that builds and whose version the wheels are for.
        have: output of ``pip list --format=freeze`` or ``pip freeze`` on the other machine.
    """
    if folder.is_dir() and any(folder.iterdir()):
        sys.exit(f"error: {folder} is not empty; expected a new or empty folder, as all wheels in it will be installed")
    folder.mkdir(parents=True, exist_ok=True)
    there = set(WITH_A_GPU)
    if have is not None:
        lines = have.read_text().splitlines()
        there |= {canonical(re.split(r"[=<>@ ]", line)[0]) for line in lines if line and line[0] not in "#-"}
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    called([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
    ask = "import json, packaging.markers; print(json.dumps(packaging.markers.default_environment()))"
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(
            f"error: {python} has no packaging; expected an interpreter with it: {python} -m pip install packaging"
        )
    environment = json.loads(asked.stdout)
    (mine,) = folder.glob("cnext-*.whl")
    waiting, seen = [*needed(mine, environment), *TESTS], set()
    while waiting:
        requirement = waiting.pop()
        name = canonical(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
        if name in seen or name in there or name.startswith(("nvidia-", "cuda-")):
            continue
        seen.add(name)
        before = set(folder.glob("*.whl"))
        called([*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement])
        for wheel in set(folder.glob("*.whl")) - before:
            waiting += needed(wheel, environment)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:8.1f} MB in {folder}")
    print("\nOn the other machine, in this tree:\n")
    print(f"    python -m pip install --no-index --no-deps --target ../with-cnext {folder}/*.whl")
    print("    PYTHONPATH=../with-cnext python bench/gpu.py --out evidence")


def called(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
