"""Runs every C++ kernel under AddressSanitizer and UBSan: ``python tests/ops/sanitize.py``. Needs no torch.

Builds csrc/cpu with CNEXT_SANITIZE=1 into a temporary folder, and calls each kernel of each instruction set on buffers
without a byte to spare, of sizes around every boundary, aligned and not, with finite values and without.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy

ROOT = Path(__file__).parents[2]
SIZES = (0, 1, 31, 63, 511, 513, 1000, 16383, 16385, 40001)


def build(folder: str) -> None:
    """Builds the sanitized module, and runs this file again on it with the sanitizers' runtime loaded first."""
    environment = os.environ | {"CNEXT_SANITIZE": "1", "CNEXT_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder + "/temp"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment |= {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": folder + "/cnext",
    }
    subprocess.run([sys.executable, __file__, "run"], env=environment, check=True)


def run() -> None:
    """Every kernel of the list that C++ and CUDA share, with as many numbers as it declares."""
    import _cpu

    generator = numpy.random.default_rng(0)
    narrow = {
        "f": lambda x: x,
        "b": lambda x: (x.view(numpy.uint32) >> 16).astype("u2"),
        "h": lambda x: x.astype(numpy.float16),
    }
    for name in _cpu.instruction_sets():
        _cpu.use_instruction_set(name)
        for rule, dtypes, kinds, scalars, row_width in _cpu.kernels():
            for threads in (1, 3):
                arrays = []
                for letter in dtypes:
                    values = [generator.standard_normal(size).astype(numpy.float32) for size in SIZES]
                    for value in values:
                        value[::7] = numpy.inf
                        value[1::7] = numpy.nan
                    arrays.append([narrow[letter](value) for value in values])
                # Exact allocations: numpy asks malloc for each, so a byte past the end is in a red zone.
                pointers = numpy.array([[a.ctypes.data for a in values] for values in arrays], dtype=numpy.int64)
                columns, rows = numpy.zeros((len(SIZES), len(kinds))), numpy.ones((len(SIZES), row_width))
                _cpu.foreach(
                    rule,
                    dtypes,
                    pointers,
                    numpy.array(SIZES, dtype=numpy.int64),
                    [0.5] * scalars,
                    columns=columns.ctypes.data,
                    column_width=len(kinds),
                    rows=rows.ctypes.data,
                    row_width=row_width,
                    threads=threads,
                )
        dropout(_cpu, generator)
        kron(_cpu, generator)
        if _cpu.has_low_rank():
            low_rank(_cpu, generator)
    sets = len(_cpu.instruction_sets())
    what = "dropout, Kronecker factors and low-rank products"
    print(f"{len(_cpu.kernels())} kernels, {what} x {sets} instruction sets: clean")


def dropout(module: ModuleType, generator: numpy.random.Generator) -> None:
    """Dropout of every type on rows of every length around a tile, with gaps between them and without."""
    seed = numpy.array([-1], dtype=numpy.int64)
    for letter, dtype in (("f", "f4"), ("b", "u2"), ("h", "u2"), ("d", "f8")):
        for columns in (1, 15, 16, 127, 128, 129, 300):
            for gap in (0, 3):
                raw = generator.integers(0, 256, numpy.dtype(dtype).itemsize * (7 * (columns + gap) - gap), numpy.uint8)
                x, out = raw.view(dtype).copy(), numpy.empty(7 * columns, dtype)
                for add in (False, True):
                    sizes = (7, columns, columns + gap, columns)
                    addresses = (x.ctypes.data, out.ctypes.data)
                    module.dropout(letter, add, *addresses, *sizes, 5, 128, seed.ctypes.data, 3277, 2, 2)


def kron(module: ModuleType, generator: numpy.random.Generator) -> None:
    """The ops over Kronecker factors: sizes around those of tiles, vectors and units, both layouts, every type."""
    groups = [(n, ranks) for n in (1, 7, 8, 33, 257, 4500) for ranks in ([1], [5, 8, 3], [8, 8, 16], [30, 34])]
    sizes, parts = [], []
    for n, ranks in groups:
        sizes.append((n, sum(ranks), len(parts), len(ranks)))
        parts += [(rank, rank, 1) if (n + k) % 2 else (rank, 1, n) for k, rank in enumerate(ranks)]
    elements = [n * rank for n, ranks in groups for rank in ranks]
    lists = {"kron_accumulate": (1, "nf", []), "kron_pull": (2, "nrf", [0.5]), "kron_merge": (2, "ndnd", [2.0, 0.1])}
    for (op, (matrices, kinds, scalars)), letter, threads in itertools.product(lists.items(), "fbh", (1, 3)):
        drawn = [
            [generator.standard_normal(size).astype("f4" if letter == "f" else "f2") for size in elements]
            for _ in range(matrices)
        ]
        drawn = [[x.view("u2") if letter != "f" else x for x in one] for one in drawn]
        if op == "kron_accumulate":
            for x in drawn[0]:
                x[::7] = (
                    numpy.float16(numpy.nan).view("u2") if letter == "h" else 0x7F80 if letter == "b" else numpy.inf
                )
        state = [
            [
                numpy.abs(generator.standard_normal({"n": n, "r": r}.get(kind, r * r))).astype(
                    "f8" if kind == "d" else "f4"
                )
                for n, r, *_ in sizes
            ]
            for kind in kinds
        ]
        part_addresses, group_addresses = (
            numpy.array([[a.ctypes.data for a in one] for one in arrays], numpy.int64) for arrays in (drawn, state)
        )
        shapes = numpy.array(sizes, numpy.int64), numpy.array(parts, numpy.int64)
        module.kron(op, letter, *shapes, part_addresses, group_addresses, scalars, threads)


def low_rank(module: ModuleType, generator: numpy.random.Generator) -> None:
    """The four passes around the size of every block, without a gap behind the last row."""
    seed = numpy.array([-1], dtype=numpy.int64)
    ranks = (1, 5, 16, 24, 96, 128)
    for rows, columns, rank, gap in itertools.product((1, 7, 70, 203), (1, 33, 130, 1300, 2048), ranks, (0, 3)):
        large, small, narrow, sizes = (rows, columns), (rank, columns), (rows, rank), (rows, columns, rank)
        calls: list[tuple[str, list[tuple[int, int]], tuple[int, ...], tuple[float, ...]]] = []
        for mask in ((0, 0, 0), (seed.ctypes.data, 3277, 2)):
            calls.append(("project", [large, small, narrow], sizes, mask))
            calls.append(("grad_a", [narrow, large, small], sizes, mask))
            calls += [("expand", [narrow, small, large], sizes, (0, add, 0.5, *mask)) for add in (False, True)]
        live = (rank + 1) // 2
        calls.append(("grad_b", [large, small, (rows, live), narrow, (columns, live)], (*sizes, live), (0.5,)))
        for what, shapes, numbers_of, options in calls:
            matrices = [generator.standard_normal(m * (n + gap) - gap, "f4") for m, n in shapes]
            strides = [n + gap for _, n in shapes]
            workspace = numpy.empty(module.workspace(what, *sizes, live), numpy.uint8)
            addresses = [matrix.ctypes.data for matrix in matrices]
            getattr(module, what)("f", *addresses, *numbers_of, *strides, *options, workspace.ctypes.data, 2)


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(folder)
