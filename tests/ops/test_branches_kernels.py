"""The branches' GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA with warnings as errors."""

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
    chosen = "errs_no_more or noticed or those_of_the_reference or not_contiguous or bitwise or float64_is"
    tests = [sys.executable, "-m", "pytest", "-qx", "-k", chosen, str(Path(__file__).with_name("test_branches_ops.py"))]
    run = subprocess.run(tests, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 25


COMPILE = """
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cnext.kernels import branches as kernels

capability = int(sys.argv[1])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
types = {"fp32": torch.float32, "bf16": torch.bfloat16}
kinds = {"partial": "*fp32", "seed": "*i64", "out": "*i1", "scale": "fp32"}
report = {}
for name, operands in (("project", "x a h"), ("weigh", "dh x"), ("spread", "dh a dx"), ("mask", "")):
    kernel = getattr(kernels, name)
    for type_, dtype in types.items():
        for rank in (32,) if operands else (0,) if type_ == "bf16" else ():
            constants = kernels.shape(dtype, rank)
            warps = constants.pop("num_warps")
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            signature = {n: "*" + type_ if n in operands.split() else kinds.get(n, "i32") for n in kernel.arg_names}
            signature |= dict.fromkeys(constants, "constexpr")
            aligned = [n[0] == "*" or name.endswith("stride") or name == "columns" for name, n in signature.items()]
            divisible = {(i,): [["tt.divisibility", 16]] for i, on in enumerate(aligned) if on}
            values = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
            source = ASTSource(kernel, signature, values, divisible)
            built = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"]); file.flush()
                usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
            report[f"{name} {type_} {rank}"] = {
                "usage": usage, "shared": built.metadata.shared, "tensor_cores": "mma" in built.asm["ptx"],
                "atomics": bool(re.search(r"\\b(atom|red)\\.", built.asm["ptx"])),
            }
print(json.dumps(report))
"""


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm_{c}")
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout)
    assert len(report) == 7
    for kernel, built in report.items():
        assert re.search(r"STACK:0\b", built["usage"]), f"{kernel} spills: {built['usage']}"
        assert built["shared"] <= SHARED_MEMORY[capability], f"{kernel}: {built['shared']} bytes of shared memory"
        assert not built["atomics"], f"{kernel} is not deterministic"
        assert built["tensor_cores"] == ("bf16" in kernel and "mask" not in kernel), kernel


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
