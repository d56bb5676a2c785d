"""The Kronecker ops' GPU kernels compiled without a GPU: Triton ahead of time, CUDA with warnings as errors."""

import re
import shutil

import pytest
from ops import ahead_of_time
from ops.ahead_of_time import CAPABILITIES, assert_fits, nvcc


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    report = ahead_of_time.report("kron", capability, tmp_path)
    assert len(report) > 20
    for kernel, built in report.items():
        assert_fits(kernel, built, capability, registers=255)
        assert not built["tensor_cores"], f"{kernel}: products in less than float32"


if shutil.which("nvcc"):

    @pytest.mark.parametrize("capability", ["80", "90a"], ids=lambda c: f"sm_{c}")
    def test_cuda_compiles_without_warnings_or_spills(capability, tmp_path):
        said = nvcc("kron", capability, tmp_path)
        registers = list(map(int, re.findall(r"Used (\d+) registers", said)))
        assert len(registers) == 10
        assert max(registers) <= 128
