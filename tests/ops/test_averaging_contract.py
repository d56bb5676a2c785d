"""Averaging ops besides their values: the table of ops, checks, choice of implementation, torch.library, compile."""

import inspect
import itertools

import numpy
import pytest
import torch
from cnext.kernels import averaging as triton_kernels
from ops.averaging_cases import CASES, DEVICE, F32, IMPLS, LEVEL, clone, inputs
from torch.library import opcheck

from cnext import ops
from cnext.errors import UserError
from cnext.ops import averaging_reference, dispatch
from cnext.ops.averaging_table import OPS

SHAPES = [(4, 6), (5,)]


def arguments(op, scalars=True):
    """Valid positional and keyword arguments of ``torch.ops.cnext.<op>``."""
    torch.manual_seed(0)
    lists = [[torch.rand(shape, device=DEVICE) for shape in SHAPES[:1] * 2] for _ in op.roles]
    if op.rows[0]:
        shape = (2, op.rows[1]) if op.rows[1] > 1 else (2,)
        lists.append(torch.ones(shape, dtype=torch.float64, device=DEVICE))
    return lists, {name: 0.5 for name, value in op.scalars.items() if value is None}


every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
call = lambda op, lists, **numbers: getattr(torch.ops.cnext, op.name)(*lists, **numbers)  # noqa: E731


@every_op
def test_opcheck(op, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs of two runs, and NaN differs from itself
    lists, numbers = arguments(op)
    opcheck(getattr(torch.ops.cnext, op.name).default, tuple(lists), numbers)


@every_op
def test_version_counters_move(op):
    lists, numbers = arguments(op)
    named = dict(zip(op.roles, lists, strict=False))
    before = {name: [tensor._version for tensor in tensors] for name, tensors in named.items()}
    call(op, lists, **numbers)
    for name, tensors in named.items():
        moved = [tensor._version > version for tensor, version in zip(tensors, before[name], strict=True)]
        assert moved == [name in op.written] * 2


def spoil_dtype(lists, k):
    lists[k][1] = lists[k][1].to(torch.float64)
    return r"\[1\] has dtype torch.float64; expected"


def spoil_shape(lists, k):
    lists[k][1] = lists[k][1].reshape(6, 4)
    return r"\[1\] has shape|\[1\]; expected|, that of"


def spoil_device(lists, k):
    lists[k][1] = lists[k][1].to("meta")
    return r"has device"


def spoil_layout(lists, k):
    lists[k][1] = torch.rand(4, 12, device=DEVICE)[:, ::2]
    return r"\[1\] has gaps"


def spoil_strides(lists, k):
    lists[k][1] = torch.rand(6, 4, device=DEVICE).T
    return r"strides"


def spoil_count(lists, k):
    lists[k].append(torch.rand(4, 6, device=DEVICE))
    return r"has [23] tensors; expected"


@every_op
@pytest.mark.parametrize(
    "spoil",
    [spoil_dtype, spoil_shape, spoil_device, spoil_layout, spoil_strides, spoil_count],
    ids=lambda f: f.__name__,
)
def test_a_tensor_that_does_not_fit_is_named_before_any_write(op, spoil):
    compared = spoil in (spoil_shape, spoil_strides, spoil_count)  # with the first list
    for k, name in list(enumerate(op.roles))[compared and len(op.roles) == 1 :]:
        lists, numbers = arguments(op)
        pattern = spoil(lists, k)
        before = [[tensor.clone() for tensor in tensors] for tensors in lists[: len(op.roles)]]
        with pytest.raises(UserError, match=pattern) as caught:
            call(op, lists, **numbers)
        assert op.name in str(caught.value)
        assert k == 0 or name in str(caught.value)
        for tensors, old in zip(lists, before, strict=False):
            for a, b in zip(tensors, old, strict=True):
                assert a.is_meta or torch.equal(a, b)


@every_op
def test_one_16_bit_dtype_in_a_call(op):
    """Each of them beside float32 is taken, and the two together are refused before anything is written."""
    narrow = dict.fromkeys(role for role in op.roles.values() if role != "s")
    for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=len(narrow)):
        chosen = dict(zip(narrow, dtypes, strict=True))
        lists, numbers = arguments(op)
        for k, role in enumerate(op.roles.values()):
            lists[k] = [tensor.to(chosen.get(role, torch.float32)) for tensor in lists[k]]
        if {torch.bfloat16, torch.float16} <= set(dtypes):
            before = clone(lists[: len(op.roles)])
            expected = f"dtype {dtypes[1]}; expected torch.float32 or {dtypes[0]}, that of theta"
            with pytest.raises(UserError, match=rf"{op.name}: \w+ has {expected}"):
                call(op, lists, **numbers)
            for tensors, old in zip(lists, before, strict=False):
                assert all(map(torch.equal, tensors, old))
        else:
            call(op, lists, **numbers)


@every_op
def test_shared_memory_is_refused_where_it_is_written(op):
    for name in op.written:
        k = list(op.roles).index(name)
        for other in range(len(op.roles)):
            lists, numbers = arguments(op)
            memory = torch.rand(40, device=DEVICE)
            lists[k][0], lists[other][1] = memory[:24].view(4, 6), memory[16:].view(4, 6)
            with pytest.raises(UserError, match="shares memory"):
                call(op, lists, **numbers)


def test_memory_that_is_only_read_may_be_shared():
    gradient = torch.rand(4, device=DEVICE)
    fisher = [torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)]
    ops.fisher_accumulate_(fisher, [gradient, gradient])
    assert torch.equal(fisher[0], fisher[1])


def test_one_dense_layout_is_enough():
    image = torch.rand(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    fisher = torch.zeros_like(image)
    ops.fisher_accumulate_([fisher], [image])
    torch.testing.assert_close(fisher, image.square())


def test_rows_must_fit():
    lists, numbers = arguments(OPS["pema_step_"])
    with pytest.raises(UserError, match=r"level has dtype torch.float32.*expected torch.float64, \(2,\)"):
        ops.pema_step_(*lists[:-1], torch.ones(2, device=DEVICE), **numbers)


def signatures(op):
    """(rule, dtypes, reductions, scalars, row width) of every call that an op makes."""
    pairs = {*itertools.product("fb", "fb"), *itertools.product("fh", "fh")}
    letters = [{"s": "f", "p": param, "e": ema} for param, ema in pairs]
    for rule in op.rules:
        first = rule == op.rules[0]
        # An op's scalars go to each of its rules, and the statistics of its first rule are the rows of the next.
        reductions, row_width = (op.reductions, op.rows[1]) if first else ("", op.columns)
        for letter in letters:
            yield rule, "".join(letter[op.roles[name]] for name in op.order), reductions, len(op.scalars), row_width


BUILT = [impl for impl in ("cpp", "cuda") if dispatch.core(impl)]


@pytest.mark.parametrize("impl", BUILT)
def test_compiled_kernels_are_those_of_the_table(impl):
    declared = dispatch.core(impl).kernels()
    assert len(declared) == len(set(declared))
    assert set(declared) == {signature for op in OPS.values() for signature in signatures(op)}


@every_op
def test_triton_kernels_are_those_of_the_table(op):
    """Every scalar goes to the argument of its name; those that are converted before, to their definition."""
    scalars = {name: 0.1 + 0.2 * k for k, name in enumerate(op.scalars)}
    for rule, dtypes, reductions, _, _ in signatures(op):
        numbers, constants = triton_kernels.arguments(rule, dtypes, list(scalars.values()))
        names = triton_kernels.KERNELS[rule].arg_names
        taken = [name for name in names[names.index("rows") + 1 :] if name not in {*constants, "ALIGN", "BLOCK"}]
        given = dict(zip(taken, numbers, strict=True))
        if "beta1" in scalars:
            assert (given.pop("weight1"), given.pop("weight2")) == (1 - scalars["beta1"], 1 - scalars["beta2"])
            given["beta1"] = scalars["beta1"]
        if rule.startswith("dema"):
            given = {"factor": given["factor"] + given["rest"], "fallback": 1 - given["fallback"]}
        assert given == pytest.approx(scalars), rule
        sums = triton_kernels.SUMS.get(rule, len(reductions))
        assert reductions == "+" * sums + "<>"[: len(reductions) - sums], rule


PUBLIC = {name: op for name, op in OPS.items() if hasattr(ops, name)}


@pytest.mark.parametrize("op", PUBLIC.values(), ids=PUBLIC)
def test_public_functions_have_the_arguments_of_the_table(op):
    parameters = inspect.signature(getattr(ops, op.name)).parameters.values()
    lists = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "impl"}
    if op.convert is None:
        assert lists == [*op.roles, *([op.rows[0]] if op.rows[0] else [])]
        assert defaults == {name: inspect.Parameter.empty if v is None else v for name, v in op.scalars.items()}
    else:
        assert lists[: len(op.roles)] == list(op.roles)
        assert {n: defaults[n] for n in op.scalars if n in defaults} == {
            n: op.scalars[n] for n in op.scalars if n in defaults
        }
    assert list(inspect.signature(getattr(averaging_reference, op.name)).parameters) == [
        *op.roles,
        *([op.rows[0]] if op.rows[0] else []),
        *op.scalars,
    ]


SCALARS = {"decay": 0.85, "scale": 0.6, "damping": 0.3, "fallback": 0.45, "clamp": 0.0, "new_scale": 0.7, "c": 2.5}
SCALARS |= {"beta": 0.35, "factor": 0.15, "beta1": 0.75, "beta2": 0.55, "eps": 0.2}


@pytest.mark.parametrize("op", [op for op in OPS.values() if len(op.scalars) > 1 and op.rules], ids=lambda op: op.name)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_two_scalars_can_be_swapped(op, impl):
    """Each is another number, and the op of any two exchanged is another result."""
    lists, _ = arguments(op)
    lists[0][0][0, 0] += 3.0  # a beta outside (0, 1), where fallback counts
    if "grad" in op.roles:
        lists[1][0][1, 0] = -2.0
    scalars = {name: SCALARS[name] for name in op.scalars}

    def result(impl, **changed):
        given = [*map(clone, [lists[: len(op.roles)]]), *lists[len(op.roles) :]]
        out = call(op, [*given[0], *given[1:]], **scalars | changed, impl=impl)
        return [*(tensor for tensors in given[0] for tensor in tensors), *([] if out is None else [out])]

    right = result("reference")
    for mine, theirs in zip(result(impl), right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for one, other in itertools.combinations(scalars, 2):
        swapped = result("reference", **{one: scalars[other], other: scalars[one]})
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(swapped, right, strict=True)), (one, other)


@pytest.mark.parametrize("impl", BUILT)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scalars": [0.5] * 2}, "expected 3 scalars, got 2"),
        ({"scalars": [0.5] * 5}, "expected 3 scalars, got 5"),
        ({"row_width": 1}, "expected 4 numbers in a row, got 1"),
        ({"rows": 0}, "expected 4 numbers in a row, got 0"),
        ({"column_width": 3}, "expected 4 columns, got 3"),
        ({"columns": 0}, "expected 4 columns, got 0"),
        ({"addresses": numpy.zeros((6, 1), numpy.int64)}, "expected 5 operands, got 6"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_compiled_calls_with_wrong_counts_are_refused(impl, change, expected):
    given = {"addresses": numpy.zeros((5, 1), numpy.int64), "sizes": numpy.ones(1, numpy.int64), "scalars": [0.5] * 3}
    given |= {"columns": 8, "column_width": 4, "rows": 8, "row_width": 4} | change  # no address that can be read
    with pytest.raises(ValueError, match=f"rule adamw_pema_step_shared: {expected};"):
        dispatch.core(impl).foreach("adamw_pema_step_shared", "fffff", **given)


def test_empty_lists_do_nothing():
    level = torch.empty(0, dtype=torch.float64)
    ops.fisher_accumulate_([], [])
    ops.ema_step_([], [], beta=0.5)
    ops.pema_released_([], [], [])
    assert ops.sums([]).shape == (0,)
    assert ops.pema_merge_([], [], [], [], new_scale=1.0).shape == (0, 5)
    assert ops.pema_step_([], [], [], [], level).shape == (0, 4)
    assert ops.pema_literal_([], [], [], []).shape == (0, 4)
    assert ops.dema_step_([], [], [], []).shape == (0, 3)
    assert ops.adamw_pema_step_([], [], [], [], [], [], level, step=1, lr=0.1).shape == (0, 4)


def test_bad_names_list_the_valid_ones():
    one = [torch.ones(1, device=DEVICE)]
    with pytest.raises(UserError, match="unknown impl 'fast'; valid: cpp, cuda, triton, reference"):
        ops.sums(one, impl="fast")
    with pytest.raises(UserError, match="unknown guard 'none'; valid: fallback, clamp"):
        ops.pema_literal_(one, one, one, one, guard="none")
    with pytest.raises(UserError, match="theta\\[0\\] has shape \\(1,\\); expected a matrix"):
        ops.pema_released_(one, one, one)


def test_an_explicit_implementation_that_is_missing_raises():
    one = [torch.ones(1, device=DEVICE)]
    with pytest.raises(UserError, match=r"impl='(cuda|cpp)' is not available: (it runs on|cnext was built without it)"):
        ops.sums(one, impl="cuda" if DEVICE == "cpu" else "cpp")
    with pytest.raises(UserError, match="plain torch only"):
        ops.pema_released_([one[0][None]], [one[0][None]], [torch.zeros(1, 1, device=DEVICE)], impl="cpp")


def test_without_a_compiled_core_plain_torch_runs_and_warns_once(monkeypatch):
    monkeypatch.setattr(dispatch, "core", lambda name: None)
    dispatch.best.cache_clear()
    with pytest.warns(RuntimeWarning, match="no compiled kernels for cpu"):
        ops.sums([torch.ones(3)])
    assert ops.sums([torch.ones(3)]).item() == 3  # a second warning would be an error
    assert ops.last_path("sums") == "reference"
    dispatch.best.cache_clear()


def test_under_torch_compile_without_a_graph_break(monkeypatch):
    monkeypatch.undo()
    case = CASES["pema_step"]
    given = inputs(case)
    expected = clone(given)
    rows = ops.pema_step_(*expected, LEVEL.to(DEVICE))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(theta, gradient, fisher, ema, level):
        return ops.pema_step_(theta, [g * 1.0 for g in gradient], fisher, ema, level) + 0.0

    assert torch.equal(step(*given, LEVEL.to(DEVICE)), rows)
    assert all(torch.equal(a, b) for x, y in zip(given, expected, strict=True) for a, b in zip(x, y, strict=True))


if DEVICE == "cuda":

    def test_captured_in_a_graph():
        theta, gradient, ema = ([torch.rand(1000, device=DEVICE)] for _ in range(3))
        fisher, level = [torch.zeros(1000, device=DEVICE)], torch.ones(1, dtype=torch.float64, device=DEVICE)
        for impl in ("cuda", "triton"):
            ops.pema_step_(theta, gradient, fisher, ema, level, impl=impl)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                ops.pema_step_(theta, gradient, fisher, ema, level, impl=impl)
            expected = clone([theta, gradient, fisher, ema])
            graph.replay()
            ops.pema_step_(*expected, level, impl=impl)
            assert torch.equal(fisher[0], expected[2][0])
            assert torch.equal(ema[0], expected[3][0])


def test_gradients_of_parameters_are_untouched_by_autograd():
    parameter = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (parameter * parameter).sum()
    fisher = [torch.ones(3, dtype=F32, device=DEVICE)]
    ops.pema_merge_([parameter], [torch.zeros(3, device=DEVICE)], fisher, [fisher[0].clone()], new_scale=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
