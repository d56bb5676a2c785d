"""The GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA compiled with warnings as errors."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
"""Where the subprocesses start: a folder without a `cnext` of its own, so that they import the installed one."""
SHARED_MEMORY = {80: 166_912, 90: 232_448, 120: 101_376}


def test_triton_interpreted_agrees_with_float64():
    """The numeric tests once more, in a process where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CNEXT_TEST_IMPL": "triton", "CNEXT_TEST_DEVICE": "cpu"}
    quiet = ["-q", "-x", "-W", "ignore::RuntimeWarning"]  # of numpy, where the kernels divide by zero on purpose
    tests = [sys.executable, "-m", "pytest", *quiet, str(Path(__file__).with_name("test_averaging_ops.py"))]
    run = subprocess.run(tests, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 60


COMPILE = """
import json, pathlib, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cnext.kernels import averaging as kernels
from cnext.ops.rules import OPS

capability = int(sys.argv[1])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
report = {}
for op in OPS.values():
    for rule in op.rules:
        for param, ema in ("ff", "bf", "bb"):
            dtypes = "".join({"s": "f", "p": param, "e": ema}[op.roles[name]] for name in op.order)
            key = f"{rule} {dtypes}"
            if key in report:
                continue
            numbers, types = kernels.arguments(rule, dtypes, [0.5] * len(op.scalars))
            kernel = kernels.KERNELS[rule]
            names = kernel.arg_names
            kinds = ["*i64", "*i64", "*i32", "*i64", "i32", "*fp64", "*fp64", *["fp32"] * len(numbers)]
            constants = {**types, "ALIGN": 16, "BLOCK": kernels.BLOCK}
            signature = dict(zip(names, kinds)) | dict.fromkeys(constants, "constexpr")
            divisible = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind[0] == "*"}
            source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, divisible)
            built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": kernels.WARPS})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"]); file.flush()
                usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
            report[key] = {"usage": usage, "shared": built.metadata.shared, "ptx": built.asm["ptx"]}
print(json.dumps(report))
"""


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm_{c}")
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout)
    assert len(report) > 20
    for kernel, built in report.items():
        registers = int(re.search(r"REG:(\d+)", built["usage"])[1])
        assert registers <= 80, f"{kernel}: {registers} registers"
        assert re.search(r"STACK:0\b", built["usage"]), f"{kernel} spills: {built['usage']}"
        assert built["shared"] <= SHARED_MEMORY[capability]
        if "b" not in kernel.split()[1]:
            assert re.search(r"(ld|st)\.global\S*\.v4", built["ptx"]), f"{kernel}: loads are not vectorised"


if shutil.which("nvcc"):

    @pytest.mark.parametrize("capability", ["80", "90a"], ids=lambda c: f"sm_{c}")
    def test_cuda_compiles_with_warnings_as_errors_and_without_spills(capability, tmp_path):
        command = f"nvcc -std=c++17 -O3 -fmad=false -arch=sm_{capability} -Werror all-warnings -Xcompiler -Wall,-Wextra"
        output = ["-Xptxas", "-v", "-c", "csrc/cuda/averaging.cu", "-o", str(tmp_path / "averaging.o")]
        run = subprocess.run([*command.split(), *output], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)
        assert len(spills) > 20
        assert set(spills) == {("0", "0")}
        assert max(map(int, re.findall(r"Used (\d+) registers", run.stderr))) <= 96
