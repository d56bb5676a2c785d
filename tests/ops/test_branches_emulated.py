"""The branches' CUDA kernels on the host: tests/ops/simt.h emulates what they take from the GPU, beside float64."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")
FLAGS = "-std=c++17 -O1 -U_FORTIFY_SOURCE -Wall -Wextra -Wno-unknown-pragmas"
HERE_IT_COMPILES = sys.platform == "linux" and shutil.which(shlex.split(CXX)[0]) is not None


def compiled(name: str, folder: Path) -> Path:
    """The program of <name>_emulated.cpp, compiled into a folder."""
    source = [str(HERE / f"{name}_emulated.cpp"), "-I", str(HERE), "-o", str(folder / name)]
    built = subprocess.run([*shlex.split(CXX), *FLAGS.split(), *source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder / name


if HERE_IT_COMPILES:

    @pytest.fixture(scope="module")
    def program(tmp_path_factory):
        return compiled("branches", tmp_path_factory.mktemp("emulated"))

    def test_kernels_agree_with_float64_in_every_layout(program):
        run = subprocess.run([program], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert run.stdout.endswith(", 0 errors\n")

    def test_another_branch_s_mask_is_noticed(program):
        run = subprocess.run([program, "wrong"], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert [line.split()[0] for line in run.stdout.splitlines()] == ["project", "grad_a", "expand"]
