"""How CUDA's kernels of the branches are called, without a GPU: by a stand-in that computes from the same addresses."""

from __future__ import annotations

import ctypes
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.branches_cases import SEED, Case
from ops.tolerance import assert_as_accurate
from torch import Tensor

from cnext import ops
from cnext.ops import branches_reference, dispatch, low_rank

BINDINGS = Path(__file__).parents[2] / "csrc/cuda/module.cpp"
DTYPES = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}


def matrix(kind: str, address: int, rows: int, columns: int, stride: int) -> Tensor:
    """The matrix at an address."""
    dtype = DTYPES[kind]
    count = (rows - 1) * stride + columns
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype).as_strided((rows, columns), (stride, 1))


def mask(seed: int, threshold: int, branch: int, rows: int, columns: int, **place: int) -> Tensor:
    """What is kept, times 1 / (1 - p)."""
    if not threshold:
        return torch.ones(rows, columns)
    drawn = torch.tensor([ctypes.c_int64.from_address(seed).value])
    keep = branches_reference.dropout_mask(drawn, rows, columns, threshold / 65536, branch, **place)
    return keep * (65536 / (65536 - threshold))


class Core:
    """The module ``cnext._cuda`` in plain torch, on the CPU. It insists on what the kernels need."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def wide(self, kind: str, address: int, rows: int, columns: int, stride: int) -> Tensor:
        assert address % 16 == stride % 8 == columns % 8 == 0
        return matrix(kind, address, rows, columns, stride)

    def narrow(self, kind: str, address: int, rows: int, columns: int, stride: int) -> Tensor:
        assert 1 <= columns <= 128
        return matrix(kind, address, rows, columns, stride)

    def workspace(self, what, rows, columns, rank, live):
        self.called.append(what)
        return 4 * rank if what != "expand" else 0

    def project(self, type, x, a, h, rows, columns, rank, x_stride, a_stride, h_stride, seed, threshold, branch,
                workspace, stream):  # fmt: skip
        kept = self.wide(type, x, rows, columns, x_stride).float() * mask(seed, threshold, branch, rows, columns)
        product = kept @ self.wide(type, a, rank, columns, a_stride).float().T
        self.narrow(type, h, rows, rank, h_stride).copy_(product)

    def grad_a(self, type, dh, x, da, rows, columns, rank, dh_stride, x_stride, da_stride, seed, threshold, branch,
              workspace, stream):  # fmt: skip
        kept = self.wide(type, x, rows, columns, x_stride).float() * mask(seed, threshold, branch, rows, columns)
        product = self.narrow(type, dh, rows, rank, dh_stride).float().T @ kept
        self.wide(type, da, rank, columns, da_stride).copy_(product)

    def expand(self, type, dh, a, out, rows, columns, rank, dh_stride, a_stride, out_stride, bias, add, scale, seed,
               threshold, branch, workspace, stream):  # fmt: skip
        product = self.narrow(type, dh, rows, rank, dh_stride).float()
        product = scale * product @ self.wide(type, a, rank, columns, a_stride).float()
        product *= mask(seed, threshold, branch, rows, columns)
        result = self.wide(type, out, rows, columns, out_stride)
        product += matrix(type, bias, 1, columns, columns).float() if bias else 0.0
        result.copy_(product + result.float() if add else product)

    def grad_b(self, type, dy, bt, h, dh, db, rows, columns, rank, live, dy_stride, bt_stride, h_stride, dh_stride,
               db_stride, scale, workspace, stream):  # fmt: skip
        wide = self.wide(type, dy, rows, columns, dy_stride).float()
        product = scale * wide @ self.wide(type, bt, rank, columns, bt_stride).float().T
        self.narrow(type, dh, rows, rank, dh_stride).copy_(product)
        product = scale * wide.T @ self.narrow(type, h, rows, live, h_stride).float()
        self.narrow(type, db, columns, live, db_stride).copy_(product)

    def dropout(self, type, add, x, out, rows, columns, x_stride, out_stride, first_row, first_column, seed, threshold,
                branch, stream):  # fmt: skip
        self.called.append("dropout")
        place = {"first_row": first_row, "first_column": first_column}
        kept = matrix(type, x, rows, columns, x_stride).float() * mask(seed, threshold, branch, rows, columns, **place)
        result = matrix(type, out, rows, columns, out_stride)
        result.copy_(kept + result.float() if add else kept)


@pytest.fixture
def core(monkeypatch):
    core = Core()
    monkeypatch.setattr(dispatch, "core", lambda name: core)
    monkeypatch.setattr(dispatch, "missing", lambda impl, device: "")
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(low_rank.BLOCK_BYTES, "cpu", 2**13)  # several blocks
    return core


DROPOUT = {"dropout": 0.25}
FUSED = ["expand", "grad_b", "project", "grad_a"]
CASES = {
    "plain": ({}, ["expand", "grad_b"]),
    "dropout": ({"options": {**DROPOUT, "scale": 2.0}}, FUSED),
    "a mask for each": ({"options": {**DROPOUT, "independent": True}, "live": (True, False, True, True)}, FUSED),
    "together": ({"outer": (24, 16, 8), "options": DROPOUT, "live": (False, True, True, False)}, FUSED),
    "routed": ({"routed": True, "outer": (24, 16), "options": DROPOUT}, FUSED),
    "beyond one launch": ({"ranks": (90, 90), "options": DROPOUT, "lead": (9,)}, ["project", "expand", "grad_a"]),
    "odd width": ({"inner": 300 - 7, "lead": (70,), "options": DROPOUT}, ["expand", "grad_b", "dropout"]),
    "float32": ({"dtype": torch.float32, "lead": (70,), "inner": 264, "options": DROPOUT}, ["dropout"]),
}


@pytest.mark.parametrize(("case", "kernels"), CASES.values(), ids=CASES)
def test_kernels_are_given_what_they_compute_from(case, kernels, core):
    case = Case(**{"inner": 40, "outer": (24,), "dtype": torch.bfloat16, **case})
    results, plain, exact = case.run("cuda"), case.plain(), case.exact()
    assert set(core.called) == set(kernels)
    assert ops.last_path("lora_branches_backward") == "cuda"
    for i, triple in enumerate(zip(results, plain, exact, strict=True)):
        assert_as_accurate(*triple, factor=4.0, what=f"result {i}")


def test_a_down_projection_may_lie_in_any_order(core):
    case = Case(inner=40, outer=(24,), ranks=(8,), live=(True,), dtype=torch.bfloat16, options=DROPOUT)
    expected = case.run("cuda")
    case.a[0][0] = case.a[0][0].detach().T.contiguous().T.requires_grad_()
    for mine, theirs in zip(case.run("cuda"), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_mask_by_cuda(core):
    keep = ops.dropout_mask(SEED, 9, 300, 0.3, branch=2, impl="cuda")
    assert torch.equal(keep, branches_reference.dropout_mask(SEED, 9, 300, 0.3, 2))
    assert core.called == ["dropout"]


@pytest.mark.parametrize("name", ["project", "grad_a", "expand", "grad_b", "workspace", "dropout"])
def test_the_stand_in_takes_what_the_binding_takes(name):
    binding = re.search(rf'm\.def\("{name}", (.*?)\);\n', BINDINGS.read_text(), re.DOTALL)[1]
    taken = re.findall(r'py::arg\("(\w+)"\)', binding)
    assert taken == list(inspect.signature(getattr(Core, name)).parameters)[1:]
