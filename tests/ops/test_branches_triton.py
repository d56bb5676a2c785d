"""The branches' Triton kernels one by one, interpreted, against float64 with the reference's mask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.tolerance import assert_as_accurate

from cnext.ops import branches_reference

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
SEED = torch.tensor([-8_161_640_532_671_778], device=DEVICE)
BRANCH = 3

if INTERPRETED or DEVICE == "cuda":
    from cnext.kernels import branches as kernels

    DTYPES = pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED), ids=str
    )
    SHAPES = pytest.mark.parametrize(
        ("rows", "columns", "rank"),
        [(1, 33, 5), (64, 128, 32), (70, 130, 96), (200, 640, 5), (200, 130, 32), (70, 640, 96), (1, 640, 200)],
    )
    DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.3])

    class Pass:
        """Operands, small ones as slices of columns of wider tensors, and outputs that hold what must not stay."""

        def __init__(self, rows, columns, rank, dtype, dropout=0.0):
            self.generator = torch.Generator().manual_seed(rows + columns + rank)
            self.dtype = dtype
            self.x, self.dy = self.draw(rows, columns), self.draw(rows, columns)
            self.a = self.draw(rank, columns)
            self.dh = self.draw(rows, rank + 11)[:, 3 : 3 + rank]
            self.live = max(1, rank * 3 // 4)
            self.h = self.dh[:, : self.live]
            self.limit = branches_reference.threshold(dropout)
            self.seed = SEED if dropout else None
            ones = torch.ones(rows, columns, dtype=torch.bool, device=DEVICE)
            self.keep = branches_reference.dropout_mask(SEED, rows, columns, dropout, BRANCH) if dropout else ones
            self.factor = 65536 / (65536 - self.limit)

        def draw(self, *shape):
            return torch.randn(shape, generator=self.generator).to(self.dtype).to(DEVICE)

        def dropout(self, x):
            return torch.where(self.keep, x * self.factor, 0.0)

        def outputs(self, *shape):
            """One to be written, between columns that must stay, and the whole of it."""
            whole = torch.full((shape[0], shape[1] + 2), 7.0, dtype=self.dtype, device=DEVICE)
            return whole[:, 1:-1], whole

        def random(self):
            return self.seed, self.limit, BRANCH

    def check(out, whole, expected, *operands):
        """Within twice torch's error in the same precision; nothing is written beside the output."""
        plain, exact = expected(*operands), expected(*(operand.double() for operand in operands))
        assert exact.abs().max() > 0.1
        assert_as_accurate(out, plain.to(out.dtype), exact, factor=4.0)
        assert (whole[:, [0, -1]] == 7).all()

    @SHAPES
    @DROPOUT
    @DTYPES
    def test_project(rows, columns, rank, dtype, dropout):
        this = Pass(rows, columns, rank, dtype, dropout)
        h, whole = this.outputs(rows, rank)
        kernels.run_project(this.x, this.a, h, *this.random())
        check(h, whole, lambda x, a: this.dropout(x) @ a.T, this.x, this.a)

    @SHAPES
    @DROPOUT
    @DTYPES
    def test_grad_a(rows, columns, rank, dtype, dropout):
        this = Pass(rows, columns, rank, dtype, dropout)
        da, whole = this.outputs(rank, columns)
        kernels.run_grad_a(this.dh, this.x, da, *this.random())
        check(da, whole, lambda dh, x: dh.T @ this.dropout(x), this.dh, this.x)

    @SHAPES
    @DROPOUT
    @DTYPES
    @pytest.mark.parametrize(("add", "with_bias"), [(False, True), (True, False)], ids=["bias", "add"])
    def test_expand(rows, columns, rank, dtype, dropout, add, with_bias):
        this = Pass(rows, columns, rank, dtype, dropout)
        out, whole = this.outputs(rows, columns)
        bias = this.draw(columns) if with_bias else torch.zeros(columns, dtype=dtype, device=DEVICE)
        before = this.draw(rows, columns) if add else torch.zeros_like(this.x)
        if add:
            out.copy_(before)
        kernels.run_expand(this.dh, this.a, out, *this.random(), scale=0.5, bias=bias if with_bias else None, add=add)
        operands = this.dh, this.a, bias, before
        check(out, whole, lambda dh, a, bias, before: this.dropout(dh @ a) * 0.5 + bias + before, *operands)

    @SHAPES
    @DTYPES
    def test_grad_b(rows, columns, rank, dtype):
        this = Pass(rows, columns, rank, dtype)
        (dh, dh_whole), (db, db_whole) = this.outputs(rows, rank), this.outputs(columns, this.live)
        kernels.run_grad_b(this.dy, this.a, this.h, dh, db, 0.5)
        check(dh, dh_whole, lambda dy, bt: dy @ bt.T * 0.5, this.dy, this.a)
        check(db, db_whole, lambda dy, h: dy.T @ h * 0.5, this.dy, this.h)

    def test_what_is_dropped_does_not_count_even_if_it_is_not_finite():
        this = Pass(70, 130, 5, torch.float32, 0.3)
        expected = torch.empty(70, 5, device=DEVICE)
        kernels.run_project(this.x, this.a, expected, *this.random())
        h = torch.empty_like(expected)
        kernels.run_project(torch.where(this.keep, this.x, torch.nan), this.a, h, *this.random())
        assert torch.equal(h, expected)

    @pytest.mark.parametrize("what", ["mask", "scale", "rank"])
    def test_a_wrong_result_is_noticed(what):
        """The negative control of the tests above: another seed, 1% of scale, a forgotten row of A."""
        this = Pass(70, 130, 96, torch.float32, 0.3)
        h, whole = this.outputs(70, 96)
        random = this.random()
        if what == "mask":
            random = (SEED + 1, *random[1:])
        a = this.a.clone()
        if what == "rank":
            a[95] = 0
        kernels.run_project(this.x * (1.01 if what == "scale" else 1), a, h, *random)
        with pytest.raises(AssertionError, match="error"):
            check(h, whole, lambda x, a: this.dropout(x) @ a.T, this.x, this.a)

else:

    @pytest.mark.slow
    def test_interpreted():
        """This file once more, in a process where Triton interprets."""
        quiet = [
            "-q",
            "-x",
            "-W",
            "ignore:Conversion of an array:DeprecationWarning",
        ]  # of older interpreters, by numpy
        command = [sys.executable, "-m", "pytest", *quiet, str(Path(__file__).resolve())]
        environment = os.environ | {"TRITON_INTERPRET": "1", "CNEXT_TEST_DEVICE": "cpu"}
        run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
        assert " passed" in run.stdout
        assert "skipped" not in run.stdout
