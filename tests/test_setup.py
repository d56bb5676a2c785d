"""What `pip install` builds and leaves out, by setup.py on a tree of empty files: compilers work, are old, or fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (
    "cnext/__init__.py",
    "kernels/triton/__init__.py",
    "csrc/cpu/module.cpp",
    *(f"cnext/example_method/{name}" for name in ("__init__.py", "l2_lora.py", "test_l2_lora.py", "pyproject.toml")),
    "csrc/cuda/averaging.cu",
    "csrc/cuda/module.cpp",
)
WORKS = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 12.4, V12.4.131" && exit
while [ $# -gt 0 ]; do case "$1" in -o) : > "$2";; -MF) echo "${2%.d}:" > "$2";; esac; shift; done
"""
"""A compiler that writes empty files, and that they depend on nothing."""
FAILS = '#!/bin/sh\necho "fatal error: a broken toolkit" >&2; exit 1\n'
UNFIT = {
    "old": (WORKS.replace("12.4", "12.0"), "belongs to CUDA 12.0; the CUDA part needs 12.1 or newer"),
    "fails": (FAILS, "--version` ends with status 1: fatal error: a broken toolkit"),
    "fails to compile": (WORKS.split("while")[0] + FAILS[10:], "did not compile cnext._cuda: fatal error: a broken"),
    "cannot be run": ("", "cannot be run: "),
    "says nothing": ("#!/bin/sh\n", "prints no release"),
}
"""What an nvcc may be that cannot build the CUDA part, and what is said about it."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    for name in FILES:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    shutil.copy(ROOT / "setup.py", made)
    (made / "pyproject.toml").write_text('[project]\nname = "cnext"\nversion = "0"\n')
    return made


def programs(folder: Path, **scripts: str) -> dict[str, str]:
    """The environment of a machine that has these compilers: g_x stands for g++."""
    folder.mkdir()
    for name, script in scripts.items():
        file = folder / name.replace("_x", "++")
        file.write_text(script)
        file.chmod(0o755)
    chosen = ("CXX", "CUDA_HOME", "CUDA_PATH", "CNEXT_CUDA")
    return {key: value for key, value in os.environ.items() if key not in chosen} | {"PATH": str(folder)}


def run(tree: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    command = command or ("setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp")
    # Of warnings those of setup.py alone: a newer setuptools may have some.
    words = [sys.executable, "-W", "ignore", "-W", "default:::__main__", *command]
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True)


def outcome(tree: Path, environment: dict[str, str], folder: str = "out/cnext") -> tuple[dict[str, str], str]:
    """Why each part was left out, "" where it was built, by the record and by what lies there; and the warnings."""
    done = run(tree, environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tree / folder / "_build.json").read_text())
    for part, module in (("cpp", "_cpu"), ("cuda", "_cuda")):
        there = bool(list((tree / folder).glob(f"{module}.*")))
        assert (part in record["built"], part in record["left_out"]) == (there, not there)
    return dict.fromkeys(record["built"], "") | record["left_out"], done.stderr


def test_both_parts_are_built(tree: Path, tmp_path: Path) -> None:
    parts, warned = outcome(tree, programs(tmp_path / "bin", g_x=WORKS, nvcc=WORKS))
    assert (parts, warned) == ({"cpp": "", "cuda": ""}, "")
    built = json.loads((tree / "out/cnext/_build.json").read_text())["built"]
    assert built["cpp"].startswith("g++, for baseline")
    assert built["cuda"] == f"{tmp_path}/bin/nvcc of CUDA 12.4"


@pytest.mark.parametrize(("release", "flag"), [("12.4", "-Xfatbin=-compress-all"), ("13.0", "-compress-mode=size")])
def test_modules_are_small(release: str, flag: str, tree: Path, tmp_path: Path) -> None:
    """Device code, four fifths of the CUDA part, is compressed, and symbols are left out; not for sanitizers."""
    nvcc = WORKS.replace("12.4", release)
    for sanitized in ({}, {"CNEXT_SANITIZE": "1"}):
        outcome(tree, programs(tmp_path / f"bin{len(sanitized)}", g_x=WORKS, nvcc=nvcc) | sanitized | {"MAX_JOBS": "1"})
        cpu, cuda = ((tree / f"temp/cnext.{part}/build.ninja").read_text() for part in ("_cpu", "_cuda"))
        links = [re.search(r"rule link\n  command = (.*)", text)[1] for text in (cpu, cuda)]  # pyright: ignore
        assert flag in cuda
        assert (" -s " in links[0], "-Xlinker -s " in links[1]) == (not sanitized, True)


def test_cuda_is_skipped_silently_where_nothing_asks_for_it(tree: Path, tmp_path: Path) -> None:
    parts, warned = outcome(tree, programs(tmp_path / "none", g_x=WORKS))
    assert (parts["cuda"], warned) == ("there was no nvcc in CUDA_HOME, CUDA_PATH or PATH", "")
    environment = programs(tmp_path / "bin", g_x=WORKS, nvcc=FAILS)
    parts, warned = outcome(tree, environment | {"CNEXT_CUDA": "0"})
    assert (parts["cuda"], warned) == ("CNEXT_CUDA=0 skipped it", "")


@pytest.mark.parametrize("kind", UNFIT)
def test_an_nvcc_that_cannot_build_it_costs_the_cuda_part_alone(kind: str, tree: Path, tmp_path: Path) -> None:
    script, why = UNFIT[kind]
    environment = programs(tmp_path / "bin", g_x=WORKS, nvcc=script)
    parts, warned = outcome(tree, environment)
    assert parts["cpp"] == ""
    assert why in parts["cuda"]
    assert f"{tmp_path}/bin/nvcc" in parts["cuda"]
    assert warned.count("Warning") == 1
    assert f"the CUDA part of cnext is skipped: {parts['cuda']}. set CNEXT_CUDA=0 to skip" in warned
    assert "CNEXT_CUDA=1 to require it" in warned
    insisted = run(tree, environment | {"CNEXT_CUDA": "1"})
    assert insisted.returncode == 1
    last = insisted.stderr.splitlines()[-1]
    assert last == f"CNEXT_CUDA=1 requires the CUDA part, which cannot be built: {parts['cuda']}"


def test_what_is_asked_for_and_cannot_be_is_refused(tree: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", g_x=WORKS)
    for asked, told in (
        ({"CNEXT_CUDA": "1"}, "cannot be built: there was no nvcc in CUDA_HOME, CUDA_PATH or PATH"),
        ({"CNEXT_CUDA": "yes"}, "CNEXT_CUDA is 'yes'; expected 0, 1 or auto"),
        ({"CXX": "no-such"}, "CXX is 'no-such'; expected a C++17 compiler, and none of this name was found"),
    ):
        refused = run(tree, environment | asked)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].endswith(told)


def test_a_failing_compiler_ends_the_build_with_advice(tree: Path, tmp_path: Path) -> None:
    done = run(tree, programs(tmp_path / "bin", g_x=FAILS, nvcc=WORKS))
    assert done.returncode == 1
    told = "g++ did not compile cnext._cpu: fatal error: a broken toolkit; set CXX to another C++17 compiler"
    assert done.stderr.splitlines()[-1] == told


def test_without_a_compiler_there_is_plain_torch_and_a_warning(tree: Path, tmp_path: Path) -> None:
    parts, warned = outcome(tree, programs(tmp_path / "bin", nvcc=WORKS))
    assert set(parts.values()) == {"there was no C++ compiler (CXX, g++, clang++ or c++)"}
    assert warned.count("Warning") == 1
    assert "no C++ compiler found: cnext will run on plain torch" in warned


def test_a_skipped_part_of_an_earlier_build_is_removed(tree: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", g_x=WORKS, nvcc=WORKS)
    assert outcome(tree, environment)[0]["cuda"] == ""
    assert outcome(tree, environment | {"CNEXT_CUDA": "0"})[0]["cuda"] == "CNEXT_CUDA=0 skipped it"


def test_nothing_is_compiled_again_because_pip_has_pybind11_elsewhere(tree: Path, tmp_path: Path) -> None:
    """Each `pip install` has it in a folder of another name. Another version does compile anew."""
    environment, written = programs(tmp_path / "bin", g_x=WORKS), []
    for folder, version in (("one", 3), ("two", 3), ("three", 4)):
        (tmp_path / folder).mkdir()
        text = f"__version__ = '{version}'\ndef get_include(): return '{folder}'"
        (tmp_path / folder / "pybind11.py").write_text(text)
        outcome(tree, environment | {"PYTHONPATH": str(tmp_path / folder)})
        written.append([path.stat().st_mtime_ns for path in sorted((tree / "temp").rglob("*.o"))])
    assert written[0] == written[1]
    assert all(one < other for one, other in zip(written[1], written[2], strict=True))


def hook(name: str) -> tuple[str, str]:
    """What pip calls of a project's build backend."""
    return "-c", f"from setuptools import build_meta; build_meta.{name}('wheels')"


@pytest.mark.parametrize("scripts", [{"g_x": WORKS, "nvcc": FAILS}, {}], ids=["no CUDA", "nothing"])
def test_the_record_and_the_modules_are_in_the_wheel(scripts: dict[str, str], tree: Path, tmp_path: Path) -> None:
    done = run(tree, programs(tmp_path / "bin", **scripts), *hook("build_wheel"))
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tree / "wheels").glob("*.whl"))) as wheel:
        assert "cuda" in json.loads(wheel.read("cnext/_build.json"))["left_out"]
        modules = [name for name in wheel.namelist() if name.startswith("cnext/_c")]
        example = {name.rpartition("/")[2] for name in wheel.namelist() if name.startswith("cnext/example_method/")}
    assert [name.partition(".")[0] for name in modules] == ["cnext/_cpu"] * bool(scripts)
    assert example >= {"l2_lora.py", "test_l2_lora.py", "pyproject.toml"}


def test_an_editable_install_has_them_in_the_tree(tree: Path, tmp_path: Path) -> None:
    environment = programs(tmp_path / "bin", g_x=WORKS, nvcc=WORKS)
    for cuda in ("1", "0"):
        done = run(tree, environment | {"CNEXT_CUDA": cuda}, *hook("build_editable"))
        assert done.returncode == 0, done.stderr
        record = json.loads((tree / "cnext/_build.json").read_text())
        assert ["cpp", "cuda"][: 1 + int(cuda)] == list(record["built"])
        assert len(list((tree / "cnext").glob("_c*.*"))) == 1 + int(cuda)
