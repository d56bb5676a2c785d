"""The ops over Kronecker factors, each implementation against float64. CNEXT_TEST_DEVICE=cuda runs them on a GPU."""

import ctypes
import inspect
import math
import mmap
import sys
from typing import Any

import numpy
import pytest
import torch
from ops.averaging_cases import BF16, DEVICE, F16, F32, IMPLS, INTERPRETED, every_instruction_set
from ops.kron_cases import GROUPS, NUMBERS, Case
from ops.tolerance import assert_as_accurate
from torch.library import opcheck

from cnext import ops
from cnext.errors import UserError
from cnext.ops import checks, dispatch, kron, kron_reference
from cnext.ops.kron import OPS

every_op = pytest.mark.parametrize("name", OPS)
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_layout = pytest.mark.parametrize("layout", [1, 0, None], ids=["rows", "transposed", "both"])
FEW = [(5, [2, 3]), (4, [2])]
"""Groups for what does not depend on sizes."""


def same(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def written(name: str) -> list[bool]:
    return [one in OPS[name].written for one in OPS[name].lists]


@every_op
@every_impl
@every_layout
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_errs_no_more_than_plain_torch(name, impl, layout, dtype):
    case = Case(layout=layout, dtype=dtype)
    given = case.inputs(name)
    exact, plain = case.exact(name, given), case.run(name, given, "reference")
    for where in every_instruction_set(impl):
        result = case.run(name, given, impl)
        assert ops.last_path(name) == impl
        for label, writes, *lists in zip(OPS[name].lists, written(name), given, result, plain, exact, strict=True):
            for i, (before, mine, theirs, wide) in enumerate(zip(*lists, strict=True)):
                if writes:
                    what, roundings = f"{where}: {label}[{i}]", 2.0 if INTERPRETED else 1.0
                    assert_as_accurate(mine.cpu(), theirs.cpu(), wide, what, roundings=roundings)
                else:
                    assert torch.equal(before, mine)


@every_op
@every_impl
def test_same_bits_over_runs_and_threads(name, impl):
    sizes = [] if INTERPRETED else [(9001, [8] * 4), (4500, [60, 4])]  # more than one unit of work
    case = Case([*GROUPS, *sizes])
    given = case.inputs(name)
    threads = torch.get_num_threads()
    for _ in every_instruction_set(impl):
        first = case.run(name, given, impl)
        for count in (1, 3, 2, 7):
            if impl == "cpp":
                torch.set_num_threads(count)
            assert same(case.run(name, given, impl), first)
        torch.set_num_threads(threads)


@every_impl
@every_layout
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_row_that_is_not_finite_counts_as_zeros(impl, layout, bad):
    """Also one whose square overflows."""
    case = Case(layout=layout)
    rows, factor, grad = case.inputs("kron_accumulate_")
    cleared = [tensor.clone() for tensor in grad]
    for i, axis in enumerate(case.axes):
        for tensor, value in ((grad[i], bad), (cleared[i], 0.0)):
            (tensor if axis else tensor.T)[::3, -1] = value
    # The other elements of such a row count neither.
    for at in kron_reference._groups(case.parts):
        side = kron_reference.side_by_side(grad[at], case.axes[at])
        ignored = ~side.square().sum(1).isfinite()
        assert ignored.any()
        for tensor, axis in zip(cleared[at], case.axes[at], strict=True):
            (tensor if axis else tensor.T)[ignored] = 0.0
    for _ in every_instruction_set(impl):
        mine = case.run("kron_accumulate_", [rows, factor, grad], impl)
        expected = case.run("kron_accumulate_", [rows, factor, cleared], impl)
        assert same(mine[:2], expected[:2])
        assert all(tensor.isfinite().all() for tensor in mine[1])


@every_impl
def test_merge_with_diagonal_factors_is_the_element_wise_merge(impl):
    case = Case()
    given = case.inputs("kron_merge_")
    for k in (3, 5):
        given[k] = [tensor.diagonal().diag() for tensor in given[k]]
    (mine, *_) = case.run("kron_merge_", given, impl)
    c, damping = NUMBERS["kron_merge_"].values()
    for g, at in enumerate(kron_reference._groups(case.parts)):
        theta, start = (kron_reference.side_by_side(given[k][at], case.axes[at]) for k in (0, 1))
        new, old = (given[k][g][:, None] * given[k + 1][g].diagonal() for k in (2, 4))
        ops.pema_merge_([theta], [start], [new.contiguous()], [old.contiguous()], new_scale=1.0, c=c, damping=damping)
        merged = kron_reference.side_by_side(mine[at], case.axes[at])
        torch.testing.assert_close(merged, theta, rtol=1e-5, atol=1e-6)


@every_impl
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_merge_moves_no_row_that_was_not_used_before(impl, dtype):
    case = Case(dtype=dtype)
    given = case.inputs("kron_merge_")
    for rows in given[4]:
        rows[::2] = 0.0
    (mine, *_) = case.run("kron_merge_", given, impl)
    for before, after, axis in zip(given[0], mine, case.axes, strict=True):
        moved = (before != after) if axis else (before != after).T
        assert not moved[::2].any()
        assert moved.numel() < 10 or moved.any()


@every_impl
@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("damping", [1e-7, 1e-3, 1.0])
def test_merge_with_factors_of_few_gradients_stays_between_the_two(impl, rank, damping):
    """Rounding leaves directions of no definite sign, far above the damping: they count as no information."""
    case = Case([(40, [32])], layout=1)
    given = case.inputs("kron_merge_")
    for seed, factor in enumerate((given[3][0], given[5][0])):
        few = torch.randn(rank, 32, generator=torch.Generator().manual_seed(seed)) * 1e3
        factor.copy_(few.T @ few)
        factor.copy_((factor + factor.T) / 2)
    gap = (given[0][0] - given[1][0]).abs().max()
    for _ in every_instruction_set(impl):
        (mine, *_) = case.run("kron_merge_", given, impl, damping=damping)
        for end in (given[0][0], given[1][0]):
            assert (mine[0] - end).abs().max() <= 3 * gap


@every_op
def test_opcheck(name, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs of two runs, and NaN differs from itself
    case = Case(FEW)
    opcheck(getattr(torch.ops.cnext, name).default, (*case.inputs(name), case.parts, case.axes), NUMBERS[name])


@every_op
@pytest.mark.parametrize("impl", [None, "reference"])
def test_version_counters_move(name, impl):
    case = Case(FEW)
    given = case.inputs(name)
    before = [[tensor._version for tensor in tensors] for tensors in given]
    getattr(ops, name)(*given, case.parts, case.axes, **NUMBERS[name], impl=impl)
    for tensors, versions, writes in zip(given, before, written(name), strict=True):
        assert all((tensor._version > version) == writes for tensor, version in zip(tensors, versions, strict=True))


@every_op
def test_empty_lists_do_nothing(name):
    getattr(ops, name)(*([] for _ in OPS[name].lists), [], [], **NUMBERS[name])


@every_op
def test_public_functions_have_the_arguments_of_the_table(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    lists = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert lists == [*OPS[name].lists, "parts", "axes"]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [*OPS[name].scalars, "impl"]
    assert list(inspect.signature(getattr(kron_reference, name)).parameters) == [*lists, *OPS[name].scalars]


SPOILED = {
    "dtype": (lambda x: x.double(), r"has dtype torch.float64; expected torch.float32"),
    "device": (lambda x: x.to("meta"), r"has device meta; expected"),
    "gaps": (lambda x: x.repeat_interleave(2, -1)[..., ::2], r"has strides .*; expected a contiguous tensor"),
    "shape": (lambda x: torch.cat([x, x]), r"has shape .*; expected"),
    "dimensions": (lambda x: x[None], r"has shape .*; expected"),
}
"""A tensor that does not fit, and the error."""


def raises(name, given, parts, axes, message, **options):
    """Asserts that an op refuses a call, and that nothing was written."""
    before = [[tensor.clone() for tensor in tensors] for tensors in given]
    with pytest.raises(UserError, match=message) as caught:
        getattr(ops, name)(*given, parts, axes, **NUMBERS[name] | options)
    assert "impl" in options or name in str(caught.value)
    for tensors, old in zip(given, before, strict=True):
        assert all(a.is_meta or torch.equal(a, b) for a, b in zip(tensors, old, strict=True))


@every_op
@pytest.mark.parametrize("what", SPOILED)
def test_a_tensor_that_does_not_fit_is_named_before_any_write(name, what):
    """Before a first good call, and after it."""
    spoil, message = SPOILED[what]
    for known in (False, True):
        for k, (label, kind) in enumerate(OPS[name].lists.items()):
            case = Case([(5, [2, 3]), (4, [2, 2])])
            given = case.inputs(name)
            if known:
                case.run(name, given)
            at = 3 if kind == "part" else 1
            given[k][at] = spoil(given[k][at])
            if what == "dtype" and kind == "part":  # at[0], so that no other dtype is taken for the list's
                given[k][0] = spoil(given[k][0])
            at = r"\d" if what in ("dtype", "shape", "dimensions") else at
            raises(
                name, given, case.parts, case.axes, rf"{label}\[{at}\] {message}|\[\d\] has (shape|dtype) .*expected"
            )


@every_op
def test_one_dtype_for_all_matrices(name):
    case = Case(FEW)
    for k, kind in enumerate(OPS[name].lists.values()):
        given = case.inputs(name)
        if kind == "part":
            given[k][1] = given[k][1].half()
            expected = r"\[1\] has dtype torch.float16; expected torch.float32"
            raises(name, given, case.parts, case.axes, expected)


@every_op
@pytest.mark.parametrize(
    ("parts", "axes", "message"),
    [
        ([2, 2], [0, 1, 0], "expected parts with the number of matrices of each group"),
        ([3, 0], [0, 1, 0], "expected parts with the number of matrices of each group"),
        ([2, 1], [0, 1, 2], "an axis of 0 or 1"),
        ([3], [0, 1, 0], r"\[2\] has shape .*; expected a matrix with 5 along dimension|has 2 tensors; expected 1"),
        ([1, 1, 1], [0, 1, 0], "has 2 tensors; expected 3"),
        ([2, 1], [1, 1, 0], r"\[1\] has shape \(5, 3\); expected a matrix with 2 along dimension 0"),
    ],
)
def test_wrong_parts_and_axes_are_refused(name, parts, axes, message):
    raises(name, Case(FEW).inputs(name), parts, axes, message)


@every_op
def test_a_total_rank_above_the_largest_is_refused(name):
    case = Case([(3, [2]), (3, [60, 5])])
    raises(name, case.inputs(name), case.parts, case.axes, "group 1 have a total rank of 65; at most 64")


@every_op
def test_a_missing_tensor_and_no_elements_are_refused(name):
    case = Case(FEW)
    for k, label in enumerate(OPS[name].lists):
        given = case.inputs(name)
        given[k].pop()
        raises(name, given, case.parts, case.axes, rf"{label} has \d tensors; expected")
    given = case.inputs(name)
    for k, kind in enumerate(OPS[name].lists.values()):
        if kind == "part":
            given[k][2] = torch.empty(0, 2, device=DEVICE)
    raises(name, given, case.parts, case.axes, r"\[2\] has shape \(0, 2\); expected a matrix")


@every_op
def test_shared_memory_is_refused_where_it_is_written(name):
    """Before a first good call, after it, and once it was refused."""
    op, case = OPS[name], Case(FEW)
    for k in (k for k, writes in enumerate(written(name)) if writes):
        for other in range(len(op.lists)):
            good, given = case.inputs(name), case.inputs(name)
            size, after = given[k][0].numel(), given[other][1].numel()
            memory = torch.rand(size + after, device=DEVICE)
            given[k][0] = memory[:size].view(given[k][0].shape)
            given[other][1] = memory[size - 1 : size - 1 + after].view(given[other][1].shape)
            raises(name, given, case.parts, case.axes, "shares memory")
            case.run(name, good)
            for _ in range(2):
                raises(name, given, case.parts, case.axes, "shares memory")


def test_memory_that_is_only_read_may_be_shared():
    case = Case([(5, [2]), (5, [2])], layout=1)
    rows, factor, grad = case.inputs("kron_accumulate_")
    zeros = [[torch.zeros_like(tensor) for tensor in tensors] for tensors in (rows, factor)]
    (one, other), *_ = case.run("kron_accumulate_", [*zeros, [grad[0], grad[0]]])
    assert torch.equal(one, other)


def test_more_layouts_than_are_kept_are_all_right():
    for n in [*range(1, kron.MOST_KNOWN + 3), 1, 2]:
        case = Case([(n, [3])], layout=1)
        given = case.inputs("kron_pull_")
        torch.testing.assert_close(case.run("kron_pull_", given), case.run("kron_pull_", given, "reference"))
    assert len(kron._KNOWN) <= kron.MOST_KNOWN


def test_bad_options_are_refused():
    case = Case(FEW)
    for name in OPS:
        raises(name, case.inputs(name), case.parts, case.axes, "unknown impl 'fast'; valid: cpp", impl="fast")
        missing = "cuda" if DEVICE == "cpu" else "cpp"
        raises(name, case.inputs(name), case.parts, case.axes, f"impl='{missing}' is not available", impl=missing)
    given = case.inputs("kron_merge_")
    for option in ("c", "damping"):
        for value in (0.0, -1.0, math.nan):
            message = f"{option} is {value}; expected a positive number"
            raises("kron_merge_", given, case.parts, case.axes, message, **{option: value})


def test_no_two_scalars_can_be_swapped():
    case = Case(FEW)
    given = case.inputs("kron_merge_")
    right, swapped = ({"c": 2.5, "damping": 0.3}, {"c": 0.3, "damping": 2.5})
    for impl in IMPLS:
        mine = case.run("kron_merge_", given, impl, **right)
        torch.testing.assert_close(mine[0], case.run("kron_merge_", given, "reference", **right)[0])
        assert not torch.allclose(mine[0][0], case.run("kron_merge_", given, impl, **swapped)[0][0], rtol=1e-2)


def test_tables_in_python_are_enough(monkeypatch):
    """As with torch before 2.10."""
    monkeypatch.setattr(checks, "_exchange", lambda: None)
    case = Case(FEW)
    for name in OPS:
        given = case.inputs(name)
        torch.testing.assert_close(case.run(name, given), case.run(name, given, "reference"))


if "cpp" in IMPLS:
    CPP: Any = dispatch.core("cpp")

    def arrays(op: str, **changed):
        """Valid arguments of the compiled function for two groups, of no address that can be read."""
        part_lists, group_lists = {"kron_accumulate": (1, 2), "kron_pull": (2, 3), "kron_merge": (2, 4)}[op]
        given = {
            "op": op,
            "letter": "f",
            "groups": numpy.array([[5, 5, 0, 2], [4, 2, 2, 1]]),
            "parts": numpy.array([[2, 2, 1], [3, 1, 5], [2, 2, 1]]),
            "part_addresses": numpy.zeros((part_lists, 3), numpy.int64),
            "group_addresses": numpy.zeros((group_lists, 2), numpy.int64),
            "scalars": {"kron_accumulate": [], "kron_pull": [0.5], "kron_merge": [1.0, 0.5]}[op],
        }
        return given | changed

    @pytest.mark.parametrize("op", ["kron_accumulate", "kron_pull", "kron_merge"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"letter": "d"}, "letter must be f, b or h"),
            ({"letter": ""}, "letter must be f, b or h"),
            ({"scalars": [0.5] * 3}, "a wrong number of scalars"),
            ({"groups": numpy.array([[5, 5, 0, 2]])}, "group_addresses must be"),
            ({"groups": numpy.array([5, 5, 0, 2])}, "groups must be"),
            ({"groups": numpy.array([[5, 5, 0, 2], [4, 2, 2, 2]])}, "one after another"),
            ({"groups": numpy.array([[5, 5, 0, 2], [4, 2, 1, 1]])}, "one after another"),
            ({"groups": numpy.array([[5, 5, 0, 2], [4, 2, 2, 0]])}, "one after another"),
            ({"groups": numpy.array([[5, 2, 0, 1], [5, 3, 1, 1]])}, "every matrix must be in a group"),
            ({"groups": numpy.array([[5, 6, 0, 2], [4, 2, 2, 1]])}, "sum to its own"),
            ({"groups": numpy.array([[5, 4, 0, 2], [4, 2, 2, 1]])}, "sum to its own"),
            ({"groups": numpy.array([[5, 65, 0, 2], [4, 2, 2, 1]])}, "from 1 to 64"),
            ({"groups": numpy.array([[0, 5, 0, 2], [4, 2, 2, 1]])}, "must have rows"),
            ({"parts": numpy.array([[2, 2], [3, 1], [2, 2]])}, "parts must be"),
            ({"parts": numpy.array([[0, 2, 1], [5, 1, 5], [2, 2, 1]])}, "positive"),
            ({"parts": numpy.array([[2, 3, 1], [3, 1, 5], [2, 2, 1]])}, "must be contiguous"),
            ({"parts": numpy.array([[2, 2, 1], [3, 1, 6], [2, 2, 1]])}, "must be contiguous"),
            ({"part_addresses": numpy.zeros((4, 3), numpy.int64)}, "part_addresses must be"),
            ({"part_addresses": numpy.zeros(3, numpy.int64)}, "part_addresses must be"),
            ({"group_addresses": numpy.zeros((5, 2), numpy.int64)}, "group_addresses must be"),
        ],
    )
    def test_malformed_arrays_are_refused(op, change, message):
        with pytest.raises(ValueError, match=rf"{op}: .*{message}"):
            CPP.kron(**arrays(op, **change))

    def test_other_ops_and_types_are_refused():
        with pytest.raises(ValueError, match="kron_split: the op must be kron_accumulate, kron_pull or kron_merge"):
            CPP.kron(**arrays("kron_pull") | {"op": "kron_split"})
        with pytest.raises(TypeError):
            CPP.kron(**arrays("kron_pull", parts=numpy.array([[2.0, 2, 1], [3, 1, 5], [2, 2, 1]])))


if "cpp" in IMPLS and sys.platform == "linux":

    def at_the_end_of_a_page(tensor: torch.Tensor, keep: list) -> torch.Tensor:
        """A copy with a page behind it that cannot be read."""
        size = tensor.numel() * tensor.element_size()
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, whole + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0) == 0
        keep.append(pages)
        copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
        return copy.view(tensor.shape).copy_(tensor)

    @every_op
    @pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
    @every_layout
    def test_nothing_behind_a_tensor_is_read(name, dtype, layout):
        """A kernel that reads it ends the process."""
        case, keep = Case(layout=layout, dtype=dtype), []
        given = case.inputs(name)
        for _ in every_instruction_set("cpp"):
            ended = [[at_the_end_of_a_page(tensor, keep) for tensor in tensors] for tensors in given]
            getattr(ops, name)(*ended, case.parts, case.axes, **NUMBERS[name], impl="cpp")
            assert same(ended, case.run(name, given, "cpp"))
