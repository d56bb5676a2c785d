"""The CUDA kernels of the Kronecker ops on the host: tests/ops/simt.h emulates a GPU's threads, beside float64."""

import shlex
import shutil
import subprocess
import sys

import pytest
from ops.test_branches_emulated import CXX, FLAGS, HERE

if sys.platform == "linux" and shutil.which(shlex.split(CXX)[0]):

    @pytest.fixture(scope="module")
    def program(tmp_path_factory):
        made = tmp_path_factory.mktemp("emulated") / "kron"
        source = [str(HERE / "kron_emulated.cpp"), "-I", str(HERE), "-o", str(made)]
        built = subprocess.run([*shlex.split(CXX), *FLAGS.split(), *source], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-4000:]
        return made

    def test_kernels_agree_with_float64_in_every_layout(program):
        run = subprocess.run([program], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert run.stdout.endswith(", 0 errors\n")

    def test_a_matrix_in_the_other_layout_is_noticed(program):
        run = subprocess.run([program, "wrong"], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert [line.split()[0] for line in run.stdout.splitlines()] == ["accumulate", "pull", "merge"]
