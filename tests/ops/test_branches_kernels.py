"""The branches' GPU kernels without a GPU: Triton interpreted and compiled ahead, CUDA with warnings as errors."""

import importlib.metadata
import re
import shutil

import pytest
from ops import ahead_of_time
from ops.ahead_of_time import CAPABILITIES, assert_fits, interpreted, nvcc

from cnext.ops import dispatch

TUNED = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 6)
"""Whether Triton is as new as those that the kernels are tuned with, 3.6 and 3.8. Older ones may spill registers."""


@pytest.mark.slow
def test_triton_interpreted_agrees_with_float64():
    """The numeric tests once more, in a process where Triton interprets."""
    chosen = "errs_no_more or noticed or those_of_the_reference or not_contiguous or bitwise or float64_is or last_path"
    assert interpreted("-k", chosen, "test_branches_ops.py") >= 25


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_compiles_ahead_of_time_without_spills(capability, tmp_path):
    report = ahead_of_time.report("branches", capability, tmp_path)
    assert len(report) == 48
    for kernel, built in report.items():
        if TUNED:
            bounded = capability == 90 and re.match(r"(project|grad_a|grad_b) bf16|expand bf16 (32|96)$", kernel)
            assert_fits(kernel, built, capability, registers=128 if bounded else 255)
        assert built["tensor_cores"] == ("bf16" in kernel), kernel
        assert built["loads_16"] or kernel == "mask", kernel
        assert built["stores_16"], kernel


EXPECTED = {
    "dropout_vectors": 6,  # three types, added to what is there or not
    "dropout_elements": 6,
    "project_kernel": 10,  # two types, five ranks
    "grad_a_kernel": 10,
    "expand_kernel": 20,  # with a bias or a sum, and without
    "grad_b_kernel": 8,  # of which a rank above 96 takes two
    "combine_kernel": 2,
}
"""How many of each CUDA kernel there are."""
SMALL = ("dropout_vectors", "dropout_elements", "combine_kernel")
_PRODUCT = ("cp.async.cg.shared.global", "ldmatrix.sync.aligned.m8n8.x4", "mma.sync.aligned.m16n8k16")
WIDE = {
    "dropout_vectors": ("ld.global.nc.v4", "st.global.v4", "vote.sync.ballot"),
    "dropout_elements": (),
    "project_kernel": _PRODUCT,
    "grad_a_kernel": _PRODUCT,
    "expand_kernel": (*_PRODUCT, "st.global.v4"),
    "grad_b_kernel": (*_PRODUCT, "st.global.v4"),
    "combine_kernel": ("ld.global.v4",),
}
"""Instructions that each must have: 16 bytes at a time, and the tensor cores."""

if shutil.which("nvcc"):

    @pytest.mark.parametrize("capability", ["80", "90a"], ids=lambda c: f"sm_{c}")
    def test_cuda_compiles_without_warnings_or_spills(capability, tmp_path):
        said = nvcc("branches", capability, tmp_path)
        ptx = next(tmp_path.glob("branches*.ptx")).read_text()
        registers = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", said, re.DOTALL))
        found = dict.fromkeys(EXPECTED, 0)
        for body in ptx.split(".entry ")[1:]:
            name = re.match(r"\w+", body)[0]
            kernel = next(kernel for kernel in EXPECTED if kernel in name)
            found[kernel] += 1
            assert int(registers[name]) <= (64 if kernel in SMALL else 255), name
            for instruction in WIDE[kernel]:
                assert instruction in body, f"{name}: no {instruction}"
        assert found == EXPECTED


if dispatch.core("cuda") is not None:

    def test_cuda_products_workspace_and_refusals():
        """Of the CUDA part where it was built; no device is needed."""
        cuda = dispatch.core("cuda")
        sizes = {what: cuda.workspace(what, 14080, 5120, 32, 32) for what in ("project", "grad_a", "expand", "grad_b")}
        assert sizes["expand"] == 0
        assert all(size % 4 == 0 for size in sizes.values())
        assert sizes["grad_b"] >= 4 * 32 * (14080 + 5120)
        with pytest.raises(ValueError, match="expected project, grad_a, expand or grad_b, not mix"):
            cuda.workspace("mix", 1, 8, 1, 1)
        with pytest.raises(ValueError, match="rank must be 1 to 128"):
            cuda.workspace("grad_a", 64, 128, 129, 0)
        layouts = {
            "columns must be a multiple of 8": ("b", 12, 16, 0, 0),
            "a stride that is a multiple of 8": ("b", 16, 17, 0, 0),
            "dropout needs a seed": ("b", 16, 16, 0, 100),
            "threshold must be below 65536": ("b", 16, 16, 16, 65536),
            "type must be b or h": ("f", 16, 16, 0, 0),
        }
        for said, (letter, columns, stride, seed, threshold) in layouts.items():
            with pytest.raises(RuntimeError, match=said):
                cuda.project(letter, 0, 0, 0, 5, columns, 4, stride, 16, 4, seed, threshold, 0, 0)
