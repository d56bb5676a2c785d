"""The GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA compiled with warnings as errors."""

import re
import shutil

import pytest
from ops import ahead_of_time
from ops.ahead_of_time import CAPABILITIES, assert_fits, interpreted, nvcc

from cnext.ops.averaging_table import OPS


@pytest.mark.slow
def test_triton_interpreted_agrees_with_float64_and_with_cpp():
    """The numeric tests once more, in a process where Triton interprets."""
    divisions = ("-W", "ignore::RuntimeWarning")  # by zero, on purpose
    assert interpreted(*divisions, "test_averaging_ops.py", "test_averaging_layers.py") > 100


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
        said = nvcc("averaging", capability, tmp_path)
        registers = list(map(int, re.findall(r"Used (\d+) registers", said)))
        assert len(registers) > 20
        assert max(registers) <= 96
