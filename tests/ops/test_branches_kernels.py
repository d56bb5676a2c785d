"""The branches' GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA with warnings as errors."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ops import ahead_of_time
from ops.ahead_of_time import CAPABILITIES, assert_fits

ROOT = Path(__file__).parents[2]
TUNED = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 6)
"""Whether Triton is as new as those that the kernels are tuned with, 3.6 and 3.8. Older ones may spill registers."""
HERE = Path(__file__).parent
"""Where the subprocesses start: a folder without a `cnext` of its own, so that they import the installed one."""


@pytest.mark.slow
def test_triton_interpreted_agrees_with_float64():
    """The numeric tests once more, in a process where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CNEXT_TEST_IMPL": "triton", "CNEXT_TEST_DEVICE": "cpu"}
    chosen = "errs_no_more or noticed or those_of_the_reference or not_contiguous or bitwise or float64_is or last_path"
    quiet = ["-q", "-x", "-W", "ignore:Conversion of an array:DeprecationWarning"]  # of older interpreters, by numpy
    file = str(Path(__file__).with_name("test_branches_ops.py"))
    tests = [sys.executable, "-m", "pytest", *quiet, "-k", chosen, file]
    run = subprocess.run(tests, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 25


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    report = ahead_of_time.report("branches", capability, tmp_path)
    assert len(report) == 48
    for kernel, built in report.items():
        if TUNED:
            bounded = capability == 90 and re.match(r"(project|weigh|gather) bf16|spread bf16 (32|96)$", kernel)
            assert_fits(kernel, built, capability, registers=128 if bounded else 255)
        assert built["tensor_cores"] == ("bf16" in kernel), kernel
        assert built["loads_16"] or kernel == "mask", kernel
        assert built["stores_16"], kernel


if shutil.which("nvcc"):

    @pytest.mark.parametrize("capability", ["80", "90a"], ids=lambda c: f"sm_{c}")
    def test_cuda_compiles_with_warnings_as_errors_and_without_spills(capability, tmp_path):
        command = f"nvcc -std=c++17 -O3 -fmad=false -arch=sm_{capability} -Werror all-warnings -Xcompiler -Wall,-Wextra"
        output = ["-Xptxas", "-v", "-c", "csrc/cuda/branches.cu", "-o", str(tmp_path / "branches.o")]
        run = subprocess.run([*command.split(), *output], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
        assert len(spills) == 6
        assert set(spills) == {("0", "0")}
        assert max(map(int, re.findall(r"Used (\d+) registers", run.stderr))) <= 40
