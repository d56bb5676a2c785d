"""The GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA compiled with warnings as errors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ops import ahead_of_time
from ops.ahead_of_time import CAPABILITIES, assert_fits

from cnext.ops.averaging_table import OPS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
"""Where the subprocesses start: a folder without a `cnext` of its own, so that they import the installed one."""


@pytest.mark.slow
def test_triton_interpreted_agrees_with_float64_and_with_cpp():
    """The numeric tests once more, in a process where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CNEXT_TEST_IMPL": "triton", "CNEXT_TEST_DEVICE": "cpu"}
    # Of numpy: where the kernels divide by zero on purpose, and of what older interpreters do with arrays.
    quiet = ["-q", "-x", "-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning"]
    files = (str(Path(__file__).with_name(f"test_averaging_{name}.py")) for name in ("ops", "layers"))
    tests = [sys.executable, "-m", "pytest", *quiet, *files]
    run = subprocess.run(tests, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    report = ahead_of_time.report("averaging", capability, tmp_path)
    assert len(report) > 20
    for kernel, built in report.items():
        assert_fits(kernel, built, capability, registers=168)
        if kernel == "combine":
            continue
        assert not built["contracted"], f"{kernel}: a product is contracted with a sum"
        # A thread has eight elements of each operand: two accesses of 16 bytes in float32, one in a 16-bit type.
        rule, dtypes = kernel.split()
        read, written = accessed(rule)
        width = {letter: 2 if letter == "f" else 1 for letter in "fbh"}
        assert built["loads_16"] == sum(width[dtypes[k]] for k in read), kernel
        assert built["stores_16"] == sum(width[dtypes[k]] for k in written), kernel


def accessed(rule: str) -> tuple[list[int], list[int]]:
    """The operands that a rule's kernel reads, and those that it writes."""
    op = next(op for op in OPS.values() if rule in op.rules)
    everything = list(range(len(op.order)))
    if rule == "dema_norms":
        return everything, []
    written = everything[: op.outputs]
    return [k for k in everything if not (rule == "dema_step" and op.order[k] == "grad_prev")], written


if shutil.which("nvcc"):

    @pytest.mark.parametrize("capability", ["80", "90a"], ids=lambda c: f"sm_{c}")
    def test_cuda_compiles_without_warnings_or_spills(capability, tmp_path):
        command = f"nvcc -std=c++17 -O3 -fmad=false -arch=sm_{capability} -Werror all-warnings -Xcompiler -Wall,-Wextra"
        output = ["-Xptxas", "-v", "-c", "csrc/cuda/averaging.cu", "-o", str(tmp_path / "averaging.o")]
        run = subprocess.run([*command.split(), *output], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
        assert len(spills) > 20
        assert set(spills) == {("0", "0")}
        assert max(map(int, re.findall(r"Used (\d+) registers", run.stderr))) <= 96
