"""The branches op, each implementation against float64. CNEXT_TEST_DEVICE=cuda runs them on a GPU."""

import functools
import importlib
import itertools

import pytest
import torch
from ops.averaging_cases import every_instruction_set
from ops.branches_cases import DEVICE, IMPLS, INTERPRETED, SEED, WAYS, Case
from ops.tolerance import assert_as_accurate

from cnext import ops
from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch, low_rank

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32] if INTERPRETED else [F32, BF16, F16]
# The largest error of a float32 sum depends on its order: one sum of rank 32 here, four of rank 8 in the reference.
assert_close_to_exact = functools.partial(assert_as_accurate, factor=4.0)
every_impl = pytest.mark.parametrize("impl", IMPLS)
every_way = pytest.mark.parametrize("impl", WAYS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHARED, INDEPENDENT = {"dropout": 0.25}, {"dropout": 0.25, "independent": True}
CASES = {
    "plain": {},
    "six branches": {"ranks": (8,) * 6, "live": (True, False, True, True, False, True)},
    "one branch": {"ranks": (5,), "live": (True,)},
    "odd ranks, no bias": {"ranks": (1, 5, 3), "bias": False, "options": {"scale": 0.5}},
    "vector": {"lead": ()},
    "no rows": {"lead": (0,), "options": SHARED},
    "one row": {"lead": (1,), "options": SHARED},
    "blocks": {"lead": (65,), "inner": 257, "options": SHARED},
    "dropout": {"options": {**SHARED, "scale": 2.0}},
    "dropout, some frozen": {"options": SHARED, "live": (False, True, False, True)},
    "independent": {"options": INDEPENDENT},
    "independent, some frozen": {"options": INDEPENDENT, "live": (True, True, False, False)},
    "routed": {"routed": True, "options": {"scale": 0.5}},
    "routed, dropout": {"routed": True, "options": SHARED},
    "all frozen": {"live": (False,) * 4},
    "x frozen": {"x_live": False, "options": SHARED},
    "grouped": {"outer": (29, 16, 16), "options": {"scale": 0.5}},
    "grouped, dropout, some frozen": {"outer": (29, 16), "options": SHARED, "live": (False, True, True, False)},
    "grouped, independent, routed": {"outer": (16, 29), "routed": True, "options": INDEPENDENT, "ranks": (4, 2)},
}
CASES |= {
    "no weight": {"weight": False, "bias": False, "options": {"scale": 0.5}},
    "no weight, dropout, some frozen": {"weight": False, "options": SHARED, "live": (False, True, False, True)},
    "no weight, grouped, routed": {
        "weight": False, "bias": False, "outer": (16, 29), "routed": True, "options": INDEPENDENT, "ranks": (4, 2)
    },
}  # fmt: skip
WIDE = {"lead": (70,), "inner": 264, "outer": (136, 40)}  # rows begin at 16 bytes, which CUDA's kernels insist on
CASES |= {
    "wide": {**WIDE, "options": {"scale": 0.5}},
    "wide, dropout, some frozen": {**WIDE, "options": SHARED, "live": (False, True, False, True)},
    "wide, independent, routed": {**WIDE, "routed": True, "options": INDEPENDENT},
    "wide, large rank": {**WIDE, "ranks": (90, 40), "options": {**SHARED, "scale": 0.05}, "bias": False},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@every_way
@every_dtype
def test_errs_no_more_than_plain_torch(case, impl, dtype):
    case = Case(dtype=dtype, **case)
    results, plain, exact = case.run(impl), case.plain(), case.exact()
    assert len(results) == len(plain) == len(exact)
    for i, triple in enumerate(zip(results, plain, exact, strict=True)):
        assert_close_to_exact(*triple, what=f"result {i}")


@every_way
@pytest.mark.parametrize("what", ["sign", "mask"])
def test_a_wrong_branch_is_noticed(impl, what):
    """The negative control of the test above."""
    case = Case(options=SHARED)
    plain, exact = case.plain(), case.exact()
    if what == "sign":
        with torch.no_grad():
            case.a[0][2].neg_()
    else:
        case.options = {"dropout": 0.2501}
    results = case.run(impl)
    for triple in list(zip(results, plain, exact, strict=True))[:2]:
        with pytest.raises(AssertionError, match="error"):
            assert_close_to_exact(*triple)


@every_way
@pytest.mark.parametrize("live", list(itertools.product((False, True), repeat=4)), ids=str)
def test_every_subset_of_live_branches(impl, live):
    """Frozen branches get no gradient and change nothing for the live ones."""
    full = Case(options=SHARED)
    some = Case(options=SHARED, live=live)
    everything, results = full.run(impl), some.run(impl)
    index = [0, 1, *(2 + i for i, on in enumerate(live * 2) if on)]
    assert len(results) == len(index)
    for mine, i in zip(results, index, strict=True):
        torch.testing.assert_close(mine, everything[i], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("which", ["a", "b"])
def test_one_half_of_a_branch_may_be_frozen(which):
    case = Case(options=SHARED)
    for part in getattr(case, which)[0]:
        part.requires_grad_(False)
    for triple in zip(case.run(None), case.plain(), case.exact(), strict=True):
        assert_close_to_exact(*triple)


@every_way
@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
def test_x_that_is_not_contiguous(impl, lead):
    case = Case(lead=lead, options=SHARED)
    expected = case.run(impl)
    for other in (case.x.detach().mT.contiguous().mT, torch.stack([case.x.detach()] * 2, -1)[..., 0]):
        assert not other.is_contiguous()
        case.x = other.requires_grad_(True)
        for mine, theirs in zip(case.run(impl), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Launches:
    """A kernel, or a function, that counts how often it is called; a Triton kernel is called by way of its grid."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)

    def __getitem__(self, grid):
        self.count += 1
        return self.function[grid]


@pytest.fixture
def ran(monkeypatch):
    """What was launched since the last call, by what it really calls; "torch" for nothing."""
    counted = {}

    def count(path, owner, name):
        launches = Launches(getattr(owner, name))
        monkeypatch.setattr(owner, name, launches)
        counted.setdefault(path, []).append(launches)

    count("reference", branches_reference, "lora_branches")
    passes = ("project", "grad_a", "expand", "grad_b")
    for impl in IMPLS:
        owner = importlib.import_module("cnext.kernels.branches") if impl == "triton" else dispatch.core(impl)
        for name in (*passes, "mask" if impl == "triton" else "dropout"):
            count(impl, owner, name)

    def ask():
        found = {path: sum(one.count for one in launches) for path, launches in counted.items()}
        for launches in counted.values():
            for one in launches:
                one.count = 0
        names = [path for path, launched in found.items() if launched]
        assert len(names) < 2
        return names[0] if names else "torch"

    return ask


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@every_way
def test_last_path_names_what_was_launched(impl, dropout, ran):
    # CUDA and Triton write y, and take both products of dY from one kernel, without dropout too.
    expected = impl if dropout or impl in ("cuda", "triton", "reference") else "torch"
    case = Case(inner=40, outer=(24, 16), dtype=F32 if INTERPRETED else BF16, options={"dropout": dropout})
    for live in (True, False):
        with torch.set_grad_enabled(live):
            outputs = ops.lora_branches_grouped(*case.arguments(), seed=SEED, dropout=dropout, impl=impl)
        assert ran() == ops.last_path("lora_branches") == expected
        if live:
            torch.autograd.grad(outputs, case.leaves, case.grads)
            if impl != "reference":
                assert ran() == ops.last_path("lora_branches_backward") == expected


if "cpp" in IMPLS:

    def test_last_path_in_cpp_without_dropout(ran):
        """The products of float32 are its own, from some rows on and where there is a fused multiply-add."""
        fused = dispatch.core("cpp").has_low_rank()
        for rows in (low_rank.FEWEST_ROWS, low_rank.FEWEST_ROWS - 1):
            case = Case(lead=(rows,))
            outputs = ops.lora_branches_grouped(*case.arguments(), impl="cpp")
            expected = "cpp" if fused and rows == low_rank.FEWEST_ROWS else "torch"
            assert ran() == ops.last_path("lora_branches") == expected
            torch.autograd.grad(outputs, case.leaves, case.grads)
            assert ran() == ops.last_path("lora_branches_backward") == expected


@every_way
def test_last_path_where_dropout_meets_nothing(impl, ran):
    """The gradient of B alone comes from what the forward pass has kept, and no rows need no kernel."""
    case = Case(options=SHARED, x_live=False)
    for part in case.a[0]:
        part.requires_grad_(False)
    case.run(impl)
    ran()
    if impl != "reference":
        assert ops.last_path("lora_branches_backward") == "torch"
    assert ops.last_path("lora_branches") == impl
    with torch.no_grad():
        ops.lora_branches(case.x[:0], case.weights[0], None, case.a[0], case.b[0], seed=SEED, dropout=0.25, impl=impl)
    assert ran() == ops.last_path("lora_branches") == ("reference" if impl == "reference" else "torch")


@every_way
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_last_path_without_a_weight(impl, dropout):
    Case(weight=False, lead=(70,), options={"dropout": dropout}).run(impl)
    # The reference has no backward pass of its own.
    paths = [ops.last_path("lora_branches")] + [ops.last_path("lora_branches_backward")] * (impl != "reference")
    assert set(paths) == {"reference" if impl == "reference" else "plain"}


@every_impl
def test_last_path_of_a_mask(impl, ran):
    for rows, expected in ((3, impl), (0, "torch")):
        ops.dropout_mask(SEED, rows, 130, 0.3, impl=impl)
        assert ran() == ops.last_path("dropout_mask") == expected
    ops.dropout_mask(SEED, 3, 130, 0.3, impl="reference")
    assert ran() == "torch"
    assert ops.last_path("dropout_mask") == "reference"


@every_impl
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 128), (70, 300)], ids=str)
@pytest.mark.parametrize("branch", [0, 3])
def test_masks_are_those_of_the_reference(impl, shape, branch):
    expected = branches_reference.dropout_mask(SEED, *shape, 0.3, branch)
    for name in every_instruction_set(impl):
        assert torch.equal(ops.dropout_mask(SEED, *shape, 0.3, branch=branch, impl=impl), expected), name


@every_impl
@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_masks_keep_as_many_as_they_should_and_look_independent(impl, dropout):
    rows, columns = 400, 512
    masks = [
        ops.dropout_mask(SEED + i, rows, columns, dropout, branch=b, impl=impl) for i, b in ((0, 0), (0, 1), (1, 0))
    ]
    deviation = (dropout * (1 - dropout) / (rows * columns)) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean() - (1 - dropout)) < 5 * deviation
        worst = (mask.double().mean(0) - (1 - dropout)).abs().max()
        assert worst < 6 * (dropout * (1 - dropout) / rows) ** 0.5
    signs = [(mask.double() - (1 - dropout)).flatten() / (dropout * (1 - dropout)) ** 0.5 for mask in masks]
    pairs = [
        (signs[0], signs[1]),
        (signs[0], signs[2]),
        (signs[0][:-1], signs[0][1:]),
        (signs[0][:-512], signs[0][512:]),
    ]
    for one, other in pairs:
        assert abs((one * other).mean()) < 5 / (rows * columns) ** 0.5


def test_philox_gives_the_published_numbers(monkeypatch):
    """Known answers of the ten-round generator, from the authors' own test vectors."""
    monkeypatch.setattr(branches_reference, "ROUNDS", 10)
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = [w.item() for w in branches_reference.philox([zero] * 4, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [w.item() for w in branches_reference.philox([ones] * 4, torch.tensor([-1]))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@every_way
@every_dtype
def test_bitwise_repeatable(impl, dtype):
    case = Case(lead=(67,), inner=257, options=INDEPENDENT, dtype=dtype)
    first = case.run(impl)
    for _ in range(2 if INTERPRETED else 20):
        assert all(torch.equal(a, b) for a, b in zip(case.run(impl), first, strict=True))


if "cpp" in IMPLS:

    @pytest.mark.parametrize("dtype", [F32, BF16, F16, torch.float64], ids=str)
    def test_dropout_same_bits_on_any_threads_and_instruction_sets(dtype):
        specials = [0.0, -0.0, 1e-40, 6e-8, 65504.0, 7e4, torch.inf, -torch.inf, torch.nan, 1 / 3]
        x = torch.tensor(specials * 60).to(dtype).view(2, 300).repeat(90, 1)
        keep = branches_reference.dropout_mask(SEED, *x.shape, 0.5)
        expected = torch.where(keep, x * 2, 0.0)
        core = dispatch.core("cpp")
        letter = {F32: "f", BF16: "b", F16: "h", torch.float64: "d"}[dtype]
        for _ in every_instruction_set("cpp"):
            for threads in (1, 3):
                out = torch.empty_like(x)
                pointers = (x.data_ptr(), out.data_ptr(), *x.shape, 300, 300, 0, 0, SEED.data_ptr(), 32768, 0, threads)
                core.dropout(letter, False, *pointers)
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
                core.dropout(letter, True, *pointers)
                torch.testing.assert_close(out, expected + expected, rtol=0, atol=0, equal_nan=True)


@every_way
def test_seeds_come_from_torchs_generator(impl):
    x, weight, a, b = (torch.ones(shape, device=DEVICE) for shape in ((4, 8), (8, 8), (2, 8), (8, 2)))

    def draw(seed):
        torch.manual_seed(seed)
        return ops.lora_branches(x, weight, None, [a], [b], dropout=0.5, impl=impl)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


if "triton" in IMPLS:

    def test_float64_is_refused_where_it_would_be_narrowed():
        with pytest.raises(UserError, match="impl='triton' does not support float64 with dropout; take impl='torch'"):
            Case(dtype=torch.float64, options=SHARED).run("triton")
