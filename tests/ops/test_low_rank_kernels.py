"""The C++ kernels of `cnext.ops.low_rank`, pass by pass: against float64, and to the bit on any number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from ops.branches_cases import SEED, Case
from ops.tolerance import assert_as_accurate
from torch import Tensor

from cnext import ops
from cnext.ops import branches_reference, dispatch, low_rank

F32 = torch.float32
LIMIT = 16384  # a quarter is dropped
MASK = (SEED.data_ptr(), LIMIT, 3)
NO_MASKS = ((0, 0, 0), (0, LIMIT, 3), (SEED.data_ptr(), 0, 3))
CPP = dispatch.core("cpp")
assert CPP is not None, "conftest.py leaves this file out where there are no C++ kernels"


@contextmanager
def using(name: str) -> Iterator[ModuleType]:
    """The compiled module with an instruction set."""
    before = CPP.use_instruction_set(name)
    try:
        yield CPP
    finally:
        CPP.use_instruction_set(before)


def is_fused(name: str) -> bool:
    with using(name) as module:
        return module.has_low_rank()


SETS = CPP.instruction_sets()
FUSED = [name for name in SETS if is_fused(name)]
"""Those that do not leave the products to torch."""


@pytest.fixture(params=SETS)
def core(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with using(request.param) as module:
        yield module


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with using(request.param) as module:
        yield module


def test_no_module_leaves_another_instruction_set_behind() -> None:
    """Sums in an order of its own would make runs in this process differ from those of others."""
    assert CPP.instruction_set() == SETS[0]


def drawn(rows: int, columns: int, gap: int) -> Tensor:
    """A matrix with as many elements between its rows as gap says."""
    return torch.randn(rows, columns + gap)[:, :columns]


def run(core: ModuleType, what: str, operands: list[Tensor], outs: list[Tensor], sizes, *numbers, threads: int = 1):
    """A product into submatrices of larger ones, around which nothing may be written."""
    wider = [torch.full((out.shape[0], out.shape[1] + 5), torch.nan) for out in outs]
    inner = [wide[:, 2:-3].copy_(out) for wide, out in zip(wider, outs, strict=True)]
    matrices = [*operands, *inner]
    live = sizes[3] if len(sizes) > 3 else 0
    workspace = torch.empty(core.workspace(what, *sizes[:3], live) // 4)
    strides = (m.stride(0) for m in matrices)
    core_pass = getattr(core, what)
    core_pass("f", *(m.data_ptr() for m in matrices), *sizes, *strides, *numbers, workspace.data_ptr(), threads)
    for wide in wider:
        assert wide[:, :2].isnan().all()
        assert wide[:, -3:].isnan().all()
    return inner


def assert_sums(mine: Tensor, left: Tensor, right: Tensor, factor: Tensor | float = 1.0, start: Tensor | float = 0.0):
    """mine = start + factor * left right, with an error that is small beside the sum of the terms' magnitudes."""
    left, right = left.double(), right.double()
    exact, size = start + factor * (left @ right), factor * (left.abs() @ right.abs())
    assert ((mine.double() - exact).abs() <= 2**-20 * (size + exact.abs())).all()


@pytest.mark.parametrize("rank", [1, 5, 8, 32, 96, 128])
@pytest.mark.parametrize("columns", [1, 33, 130, 640, 1300])
@pytest.mark.parametrize("rows", [1, 7, 70, 203])
def test_every_pass_is_exact_and_the_same_on_any_threads(fused, rows, columns, rank):
    torch.manual_seed(rows + columns + rank)
    gap, sizes = rank % 3, (rows, columns, rank)
    x, a, h, out = (drawn(*shape, gap) for shape in ((rows, columns), (rank, columns), (rows, rank), (rows, columns)))
    keep = branches_reference.dropout_mask(SEED, rows, columns, LIMIT / 65536, 3)
    dropped = torch.where(keep, x.double() * (65536 / (65536 - LIMIT)), 0.0)
    for numbers, seen in ((MASK, dropped), *((none, x) for none in NO_MASKS)):
        for threads in (1, 3):
            results = [
                *run(fused, "project", [x, a], [h], sizes, *numbers, threads=threads),
                *run(fused, "grad_a", [h, x], [a], sizes, *numbers, threads=threads),
                *run(fused, "expand", [h, a], [out], sizes, 0, False, 0.5, *numbers, threads=threads),
                *run(fused, "expand", [h, a], [out], sizes, 0, True, 0.5, *numbers, threads=threads),
            ]
            if threads == 1:
                expected = results
            assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
        assert_sums(results[0], seen, a.T)
        assert_sums(results[1], h.T, seen)
        factor = 0.5 if seen is x else keep * (0.5 * 65536 / (65536 - LIMIT))
        assert_sums(results[2], h, a, factor)
        assert_sums(results[3], h, a, factor, out)
        if seen is not x:
            assert torch.equal(results[2] != 0, keep)
            assert torch.equal(results[3][~keep], out[~keep])


@pytest.mark.parametrize("rank", [1, 5, 32, 96, 128])
@pytest.mark.parametrize("columns", [1, 33, 130, 1024, 1300])
@pytest.mark.parametrize("rows", [1, 7, 70, 203])
def test_grad_b_is_exact_and_the_same_on_any_threads(fused, rows, columns, rank):
    torch.manual_seed(rows + columns + rank)
    gap, live = rank % 3 if columns % 1024 else 0, (rank + 1) * 3 // 4
    dy, b, h = drawn(rows, columns, gap), drawn(rank, columns, gap), drawn(rows, rank, gap)[:, rank - live :]
    dh, db = torch.empty(rows, rank), torch.empty(columns, live)
    results = [
        run(fused, "grad_b", [dy, b, h], [dh, db], (rows, columns, rank, live), 0.5, threads=threads)
        for threads in (1, 3)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert_sums(results[0][0], dy, b.T, 0.5)
    assert_sums(results[0][1], dy.T, h, 0.5)


def test_a_bias_is_written_below_the_product(fused):
    h, b, bias = torch.randn(70, 5), torch.randn(5, 130), torch.randn(130)
    (y,) = run(fused, "expand", [h, b], [torch.empty(70, 130)], (70, 130, 5), bias.data_ptr(), False, 0.5, 0, 0, 0)
    assert_sums(y, h, b, 0.5, bias)
    with pytest.raises(ValueError, match="a bias needs add = false"):
        run(fused, "expand", [h, b], [y], (70, 130, 5), bias.data_ptr(), True, 0.5, 0, 0, 0)


def test_what_is_not_finite_stays_in_its_row_and_column(fused):
    """The zeros that pad a tile are not multiplied with NaN or infinity of other rows and columns."""
    x, a = torch.randn(70, 130), torch.randn(5, 130)
    x[69, 129] = torch.inf
    a[4, 7] = torch.nan
    (h,) = run(fused, "project", [x, a], [torch.empty(70, 5)], (70, 130, 5), 0, 0, 0)
    assert h[:69, :4].isfinite().all()
    assert h[:, 4].isnan().all()
    assert h[69, :4].isinf().all()
    (da,) = run(fused, "grad_a", [torch.randn(70, 5), x], [a], (70, 130, 5), 0, 0, 0)
    assert da[:, :129].isfinite().all()
    assert da[:, 129].isinf().all()


def test_wrong_calls_are_refused(core):
    operands = [torch.ones(4, 4)] * 3
    if core.has_low_rank():
        for letter, rank, message in (("b", 4, "type must be f"), ("f", 0, "rank must be"), ("f", 129, "rank must be")):
            with pytest.raises(ValueError, match=message):
                core.project(letter, *(t.data_ptr() for t in operands), 4, 4, rank, 4, 4, 4, 0, 0, 0, 0, 1)
    else:
        with pytest.raises(ValueError, match="has no low-rank products"):
            core.workspace("project", 4, 4, 4, 0)


CASES = {
    "plain": {"lead": (70,), "options": {"scale": 0.5}},
    "no bias": {"lead": (70,), "bias": False},
    "dropout, some frozen": {"lead": (70,), "options": {"dropout": 0.25}, "live": (False, True, True, False)},
    "independent, routed": {"lead": (70,), "routed": True, "options": {"dropout": 0.25, "independent": True}},
    "independent without dropout": {"lead": (70,), "options": {"independent": True}},
    "grouped": {"lead": (70,), "inner": 300, "outer": (29, 130), "options": {"dropout": 0.25}},
    "of a large rank": {"lead": (70,), "ranks": (100, 60), "options": {"dropout": 0.25, "scale": 0.5}},
    "of a large rank, plain": {"lead": (70,), "ranks": (100, 60), "options": {"scale": 0.5}},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_op_errs_no_more_than_plain_torch(core, case):
    case = Case(**case)
    results = case.run("cpp")
    used = "cpp" if core.has_low_rank() or case.options.get("dropout") else "torch"
    assert ops.last_path("lora_branches") == ops.last_path("lora_branches_backward") == used
    for i, triple in enumerate(zip(results, case.plain(), case.exact(), strict=True)):
        assert_as_accurate(*triple, what=f"result {i}", factor=4.0)


def test_few_rows_and_other_types_are_left_to_torch(fused):
    few = low_rank.FEWEST_ROWS
    for rows, dtype, used in ((few, F32, "cpp"), (few - 1, F32, "torch"), (few, torch.float64, "torch")):
        Case(lead=(rows,), dtype=dtype).run("cpp")
        assert ops.last_path("lora_branches") == ops.last_path("lora_branches_backward") == used


def test_down_projections_may_have_any_strides(fused):
    """A single branch's is passed without a copy where its rows are contiguous."""
    case = Case(lead=(70,), ranks=(5,), live=(True,), options={"dropout": 0.25})
    expected = case.run("cpp")
    case.a[0][0] = case.a[0][0].detach().T.contiguous().T.requires_grad_()
    for mine, theirs in zip(case.run("cpp"), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
