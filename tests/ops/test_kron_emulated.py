"""The CUDA kernels of the Kronecker ops on the host: tests/ops/simt.h emulates a GPU's threads, beside float64."""

import subprocess

import pytest
from ops.test_branches_emulated import HERE_IT_COMPILES, compiled

if HERE_IT_COMPILES:

    @pytest.fixture(scope="module")
    def program(tmp_path_factory):
        return compiled("kron", tmp_path_factory.mktemp("emulated"))

    def test_kernels_agree_with_float64_in_every_layout(program):
        run = subprocess.run([program], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert run.stdout.endswith(", 0 errors\n")

    def test_a_matrix_in_the_other_layout_is_noticed(program):
        run = subprocess.run([program, "wrong"], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert [line.split()[0] for line in run.stdout.splitlines()] == ["accumulate", "pull", "merge"]
