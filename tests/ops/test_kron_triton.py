"""The Triton kernels of the Kronecker ops, interpreted, against float64."""

import os
from pathlib import Path

import pytest
import torch
from ops.ahead_of_time import interpreted
from ops.tolerance import assert_as_accurate

from cnext.ops import kron, kron_reference
from cnext.ops.kron import OPS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
SCALARS = {"kron_accumulate_": {}, "kron_pull_": {"weight": 0.3}, "kron_merge_": {"c": 0.7, "damping": 1e-3}}

if INTERPRETED or DEVICE == "cuda":
    from cnext.kernels import kron as kernels

    GROUPS = {
        "one": [(1, [1])],
        "several": [(7, [3, 2]), (1, [4]), (33, [8, 8, 8])],
        "wide": [(40, [20, 1, 30, 13]), (3, [64]), (2, [1] * 40)],
        "long": [(1100, [5]), (1030, [2, 1])],
    }
    every_op = pytest.mark.parametrize("name", OPS)

    def drawn(name, groups, dtype):
        """The arguments of an op: matrices in both layouts, factors of full rank, and eigenvectors that are none."""
        generator = torch.Generator().manual_seed(len(groups))

        def draw(*shape):
            return torch.randn(shape, generator=generator)

        lists = []
        ranks = [(n, rank) for n, matrices in groups for rank in matrices]
        axes = [at // 2 % 2 for at in range(len(ranks))]
        for label, kind in OPS[name].lists.items():
            if kind == "part":
                shapes = [(n, rank) if axis else (rank, n) for (n, rank), axis in zip(ranks, axes, strict=True)]
                made = [draw(*shape).to(dtype) for shape in shapes]
            elif kind == "rows":
                made = [draw(n).square() * (torch.arange(n) % 5) for n, _ in groups]
            elif kind == "values":
                made = [draw(sum(m)).square() for _, m in groups]
            elif label == "vectors":
                made = [draw(sum(m), sum(m)) / sum(m) ** 0.5 for _, m in groups]
            else:
                made = [(g := draw(sum(m), sum(m) + 2) / sum(m) ** 0.5) @ g.T for _, m in groups]
            lists.append([tensor.to(DEVICE) for tensor in made])
        return lists, [len(m) for _, m in groups], axes

    def check(name, lists, parts, axes, wrong=1.0):
        """Within four times torch's error in the same precision; what is not written stays as it is."""
        op = OPS[name]
        mine, plain = ([[x.clone() for x in xs] for xs in lists] for _ in range(2))
        exact = [[x.double() for x in xs] for xs in lists]
        scalars = SCALARS[name]
        for side in (plain, exact):
            getattr(kron_reference, name)(*side, parts, axes, **scalars)
        given = {key: value * wrong for key, value in scalars.items()}
        getattr(kron, name)(*mine, parts, axes, **given, impl="triton")
        for label, *versions, before in zip(op.lists, mine, plain, exact, lists, strict=True):
            if label in op.written:
                # The interpreter cuts to 16 bits.
                got, theirs, right = (torch.cat([x.flatten() for x in xs]) for xs in versions)
                assert_as_accurate(got, theirs, right, f"{name} {label}", 4.0, 2.0 if INTERPRETED else 1.0)
            else:
                torch.testing.assert_close(versions[0], before, rtol=0, atol=0, equal_nan=True)

    @every_op
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
    def test_agrees_with_float64(name, dtype, groups):
        if name == "kron_merge_":
            groups = [(min(n, 19), matrices) for n, matrices in groups]
        check(name, *drawn(name, groups, dtype))

    def test_rows_that_are_not_finite_count_as_zeros():
        lists, parts, axes = drawn("kron_accumulate_", GROUPS["several"], torch.float32)
        grad = lists[2]
        grad[0][1, 2], grad[2][0, 3], grad[5][:, 20] = float("nan"), float("inf"), 1e30
        check("kron_accumulate_", lists, parts, axes)

    def test_results_are_the_same_every_time():
        lists, parts, axes = drawn("kron_accumulate_", GROUPS["long"], torch.float32)
        runs = [[[x.clone() for x in xs] for xs in lists] for _ in range(2)]
        for run in runs:
            kron.kron_accumulate_(*run, parts, axes, impl="triton")
        assert all(map(torch.equal, runs[0][0] + runs[0][1], runs[1][0] + runs[1][1]))

    def test_the_tables_follow_the_tensors():
        """A second call with other tensors of the same sizes, and with other scalars."""
        for _ in range(2):
            check("kron_pull_", *drawn("kron_pull_", GROUPS["several"], torch.float32))

    @pytest.mark.parametrize("name", ["kron_pull_", "kron_merge_"])
    def test_a_wrong_scalar_is_noticed(name):
        with pytest.raises(AssertionError, match="error"):
            check(name, *drawn(name, GROUPS["several"], torch.float32), wrong=1.001)

    def test_the_other_layout_is_noticed(monkeypatch):
        built = kernels.Groups.__init__

        def swapped(self, groups, parts, *rest):
            parts = parts.copy()
            parts[0] = parts[0, 0], 1, groups[0, 0]
            built(self, groups, parts, *rest)

        monkeypatch.setattr(kernels.Groups, "__init__", swapped)
        kernels._groups.cache_clear()
        lists, parts, _ = drawn("kron_accumulate_", [(9, [5])], torch.float32)
        with pytest.raises(AssertionError, match="error"):
            check("kron_accumulate_", [*lists[:2], [lists[2][0].T.contiguous()]], parts, [1])
        kernels._groups.cache_clear()

else:

    @pytest.mark.slow
    def test_interpreted():
        """This file once more, in a process where Triton interprets."""
        assert interpreted("-W", "ignore::RuntimeWarning", Path(__file__).name) > 40
