"""Compiles a family's Triton kernels for a GPU that need not be there: ``python ahead_of_time.py branches 90``.

Prints as JSON what each takes: registers a thread, spilled bytes, shared memory and threads a program, out of the
compiled code; of its PTX how many accesses are of 16 bytes, and whether it has tensor cores, atomics, and products
contracted with sums.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 166_912, 90: 232_448, 120: 101_376}
"""Bytes that a program may have, by compute capability."""
CAPABILITIES = [pytest.param(c, id=f"sm_{c}", marks=[] if c == 90 else pytest.mark.slow) for c in SHARED_MEMORY]
REGISTERS = 65_536
"""Registers of a multiprocessor, on all of them."""
Spec = tuple[str, object, dict[str, str], dict[str, object], set[str], dict[str, object]]
"""Label, kernel, types of its arguments, its constants, the arguments that 16 divides, options of the compiler."""


def averaging() -> Iterator[Spec]:
    """Every rule with every combination of types, and the sum over programs."""
    from cnext.kernels import averaging as kernels

    from cnext.ops.averaging_table import OPS

    seen = set()
    for op in OPS.values():
        for rule in op.rules:
            for param, ema in ("ff", "bf", "bb", "hf", "hh"):
                dtypes = "".join({"s": "f", "p": param, "e": ema}[op.roles[name]] for name in op.order)
                if (rule, dtypes) in seen:
                    continue
                seen.add((rule, dtypes))
                kernel = kernels.KERNELS[rule]
                numbers, types = kernels.arguments(rule, dtypes, [0.5] * len(op.scalars))
                kinds = ["*i64", "*i64", "*i32", "*i64", "i32", "*fp64", "*fp64", *["fp32"] * len(numbers)]
                signature = dict(zip(kernel.arg_names, kinds, strict=False))
                pointers = {name for name, kind in signature.items() if kind[0] == "*"}
                constants = {**types, "ALIGN": 16, "BLOCK": kernels.BLOCK}
                yield f"{rule} {dtypes}", kernel, signature, constants, pointers, kernels.OPTIONS
    signature = {"partial": "*fp64", "out": "*fp64", "first_block": "*i32"}
    constants = {"COLUMNS": 5, "SUMS": 3, "BLOCK": 256}
    yield "combine", kernels.combine, signature, constants, set(signature), {"num_warps": 4}


def branches(capability: int) -> Iterator[Spec]:
    """Every pass at the rank of four branches, of three layers that read the same input, and padded to the largest.

    Without dropout too where another product is made without it, and as the launcher calls them for a width of 5120.
    """
    import torch
    from cnext.kernels import branches as kernels

    pointers = {"project": "x a out", "grad_a": "dh x out", "expand": "dh a out bias", "grad_b": "dy bt h dh db"}
    kinds = {"seed": "*i64", "scale": "fp32"}
    for name, operands in pointers.items():
        kernel = getattr(kernels, name)
        for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
            for rank in (32, 64) if name == "grad_b" else (32, 96, 128):
                sizes = kernels.sizes(name, dtype, rank, SHARED_MEMORY[capability])
                options = {n: v for n, v in sizes.items() if n not in kernel.arg_names}
                steps = -(-rank // sizes["RANK"])
                constants = sizes | {"rank": min(rank, sizes["RANK"]) if name == "grad_b" else rank, "STEPS": steps}
                constants |= {"live": min(24, rank), "LIVE": sizes["RANK"], "dh_stride": rank, "h_stride": rank}
                constants |= {"MASK": True, "FULL": True, "ADD": False, "BIAS": False, "bias": None}
                variants = {"": {}}
                if name != "grad_b":
                    variants[" no mask"] = {"MASK": False, "seed": None}
                if name == "expand":
                    variants[" no mask"] |= {"BIAS": True}
                    variants[" add"] = {"ADD": True}
                for variant, changes in variants.items():
                    own = {n: v for n, v in (constants | changes).items() if n in kernel.arg_names}
                    if own.get("BIAS"):
                        del own["bias"]
                    if own.get("ADD"):
                        bounded = kernels.sizes("add", dtype, rank, SHARED_MEMORY[capability])
                        options = {n: v for n, v in bounded.items() if n not in kernel.arg_names}
                    types = {n: f"*{kind}" if n in operands.split() else kinds.get(n, "i32") for n in kernel.arg_names}
                    if name == "grad_b":
                        types |= {"dh": "*fp32", "db": "*fp32"}
                    yield f"{name} {kind} {rank}{variant}", kernel, types, own, _divisible(types, own), options
    for name, constants in (("combine", {"ROWS": 32, "COLUMNS": 32}), ("mask", {"ROWS": 64})):
        kernel = getattr(kernels, name)
        kinds = {"seed": "*i64", "scale": "fp32", "partial": "*fp32", "out": "*bf16" if name == "combine" else "*i1"}
        types = {n: kinds.get(n, "i32") for n in kernel.arg_names}
        yield name, kernel, types, constants, _divisible(types, constants), {"num_warps": 4}


def kron() -> Iterator[Spec]:
    """Every op with every type and width of a group."""
    from cnext.kernels import kron as kernels

    kinds = {"block_group": "*i32", "partial": "*fp32", "matrices": "i32", "groups": "i32"}
    for width in (16, 32, 64):
        for name, sizes in kernels.SIZES.items():
            for letter, dtype in kernels.TYPES.items():
                kernel, constants = kernels.KERNELS[name], {"TYPE": dtype, "R": width, **sizes}
                types = {n: kinds.get(n, "*i64") for n in kernel.arg_names}
                label, options = f"{name} {letter} {width}", {"num_warps": kernels.WARPS[name][width]}
                yield label, kernel, types, constants, _divisible(types, constants), options
        types = {n: kinds.get(n, "*i64") for n in kernels.combine.arg_names}
        constants = {"R": width, "BLOCK": kernels.COMBINED}
        yield f"combine {width}", kernels.combine, types, constants, _divisible(types, constants), {"num_warps": 4}


def _divisible(types: dict[str, str], constants: dict[str, object]) -> set[str]:
    """The arguments that 16 divides as a rule."""
    multiples = {n for n, kind in types.items() if kind[0] == "*" or n.endswith(("stride", "part")) or n == "columns"}
    return multiples - set(constants)


def compiled(spec: Spec, capability: int) -> Mapping[str, int | bool]:
    """What a kernel takes once it is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants, divisible, options = spec
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    built = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    (registers, stack, local) = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    ptx = built.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": built.metadata.shared,
        "threads": options["num_warps"] * 32,
        "loads_16": len(re.findall(r"\bld\.global\S*\.v4\.[bf]32|\bcp\.async\.cg\.\S+ \[.*\], \[.*\], 0x10", ptx)),
        "stores_16": len(re.findall(r"\bst\.global\S*\.v4\.[bf]32", ptx)),
        "contracted": bool(re.search(r"\bfma\.", ptx)),
        "tensor_cores": "mma" in ptx,
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def report(family: str, capability: int, cache: Path) -> dict[str, dict[str, int | bool]]:
    """What each kernel of a family takes, found in a process of its own: in this one Triton may interpret."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, family, str(capability)]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def interpreted(*tests: str) -> int:
    """Runs tests of this folder in a process where Triton interprets, with options of pytest; how many passed."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CNEXT_TEST_IMPL": "triton", "CNEXT_TEST_DEVICE": "cpu"}
    quiet = ["-q", "-x", "-W", "ignore:Conversion of an array:DeprecationWarning"]  # by numpy, of older interpreters
    command = [sys.executable, "-m", "pytest", *quiet, *tests]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout
    return int(re.search(r"(\d+) passed", run.stdout)[1])


def nvcc(source: str, capability: str, folder: Path) -> str:
    """Compiles a file of csrc/cuda with warnings as errors, and keeps its PTX in a folder; the output of ptxas.

    No kernel may have a stack frame or spill a register.
    """
    flags = f"-std=c++17 -O3 -fmad=false -arch=sm_{capability} -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v"
    output = ["-c", f"csrc/cuda/{source}.cu", "-o", str(folder / f"{source}.o"), "-keep", "--keep-dir", str(folder)]
    root = Path(__file__).parents[2]
    run = subprocess.run(["nvcc", *flags.split(), *output], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert set(re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", run.stderr)) == {("0", "0")}
    return run.stderr


def assert_fits(kernel: str, built: Mapping[str, int | bool], capability: int, registers: int) -> None:
    """No register is spilled, and the kernel stays within its registers and the GPU's shared memory."""
    assert not built["spilled"], f"{kernel} spills {built['spilled']} bytes"
    assert built["registers"] <= registers, f"{kernel}: {built['registers']} registers"
    assert built["registers"] * built["threads"] <= REGISTERS, f"{kernel} does not start"
    assert built["shared"] <= SHARED_MEMORY[capability], f"{kernel}: {built['shared']} bytes of shared memory"
    assert not built["atomics"], f"{kernel} is not deterministic"


if __name__ == "__main__":
    capability = int(sys.argv[2])
    specs = {"averaging": averaging, "kron": kron, "branches": lambda: branches(capability)}[sys.argv[1]]()
    print(json.dumps({spec[0]: compiled(spec, capability) for spec in specs}))
