"""The branches op besides its values: autograd, torch.library, compile, checkpointing, memory, errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ops.branches_cases import DEVICE, SEED, Case, saved_by
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cnext import adapters, ops
from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch

F64, BF16 = torch.float64, torch.bfloat16
DROPOUT = {"dropout": 0.25}
warned_by_torch = pytest.mark.filterwarnings(  # torch 2.11 warns of its own code
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.torch.jit.script:DeprecationWarning"
)
every_given_impl = pytest.mark.parametrize("impl", [None, "torch"])
CHECKED = {
    "plain": {},
    "dropout": {"options": {**DROPOUT, "scale": 0.5}},
    "independent": {"options": {**DROPOUT, "independent": True}},
    "routed": {"routed": True, "options": DROPOUT},
    "grouped": {"outer": (3, 5), "options": DROPOUT},
    "no weight": {"weight": False, "bias": False, "options": DROPOUT},
}


@pytest.mark.parametrize("impl", ["torch" if DEVICE == "cuda" else None, "reference"])
@pytest.mark.parametrize("case", CHECKED.values(), ids=CHECKED)
def test_gradcheck(case, impl):
    case = Case(lead=(3,), inner=4, dtype=F64, ranks=(2, 1), **{"outer": (3,), **case})
    routing = [case.routing] if case.routed else []
    linears = len(case.outer)

    def function(x, *rest):
        routing, parts = (rest[0], rest[1:]) if case.routed else (None, rest)
        a = [parts[2 * g : 2 * g + 2] for g in range(linears)]
        b = [parts[2 * (g + linears) :][:2] for g in range(linears)]
        options = {"seed": SEED if case.options else None, **case.options}
        return tuple(
            ops.lora_branches_grouped(x, case.weights, case.biases, a, b, routing=routing, impl=impl, **options)
        )

    parts = [part for parts in (*case.a, *case.b) for part in parts]
    assert torch.autograd.gradcheck(function, (case.x, *routing, *parts))


@pytest.mark.parametrize("impl", [None, "torch"])
@pytest.mark.parametrize("independent", [False, True], ids=["shared", "independent"])
def test_opcheck(independent, impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares outputs of two runs, and NaN differs from itself
    x, weight, bias, a, b = (torch.rand(shape, device=DEVICE) for shape in ((2, 3, 8), (5, 8), (5,), (6, 8), (6, 5)))
    common = (SEED, None, [4, 2], 0.5, 0.25, independent, impl)
    y, h = torch.ops.cnext.lora_branches(x, [weight], [bias], a, [b], *common)
    opcheck(torch.ops.cnext.lora_branches.default, (x, [weight], [bias], a, [b], *common))
    opcheck(torch.ops.cnext.lora_branches.default, (x, [None], [None], a, [b], *common))
    backward = ([torch.rand_like(y)], x, h, [weight], a, [b], [0, 6], [4, 6], True, False, *common)
    opcheck(torch.ops.cnext.lora_branches_backward.default, backward)
    opcheck(torch.ops.cnext.lora_branches_backward.default, (*backward[:3], [None], *backward[4:]))
    opcheck(torch.ops.cnext.dropout_mask.default, (SEED, 3, 5, 0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_what_is_kept_for_backward(dropout):
    def kept(**options) -> int:
        case = Case(lead=(64,), inner=96, outer=(80,), options={"dropout": dropout}, **options)
        y = ops.lora_branches_grouped(*case.arguments(), seed=SEED, dropout=dropout)[0]
        owned = {t.untyped_storage().data_ptr() for t in (*case.weights, *case.biases, *case.a[0], *case.b[0], SEED)}
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved_by(y))}
        return sum(size for place, size in storages.items() if place not in owned)

    x, h = 64 * 96 * 4, 64 * 32 * 4
    assert kept() == x + h
    assert kept(live=(True, False, False, False)) == x + h
    assert kept(live=(False,) * 4) == 0, "only x needs a gradient"


def test_no_gradient_is_computed_that_is_not_wanted(monkeypatch):
    wanted = []
    backward = torch.ops.cnext.lora_branches_backward.default
    monkeypatch.setattr("cnext.ops.branches._backward", lambda *a: wanted.append((*a[6:8], a[8])) or backward(*a))
    Case(live=(False, True, False, False), x_live=False).run(None)
    Case(live=(False,) * 4).run(None)
    assert wanted == [((8, 16), (8, 16), False), ((0, 0), (0, 0), True)]
    assert not Case(live=(False,) * 4, x_live=False).run(None)[0].requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_the_mask(reentrant):
    case = Case(options=DROPOUT)

    def layer(x):
        return ops.lora_branches_grouped(x, *case.arguments()[1:], dropout=0.25)[0].sin()

    def gradients(function):
        torch.manual_seed(3)
        for leaf in case.leaves:
            leaf.grad = None
        function(case.x).backward(case.grads[0])
        return [leaf.grad for leaf in case.leaves]

    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(bool(gradient.any()) for gradient in again)
    assert all(torch.equal(one, other) for one, other in zip(again, gradients(layer), strict=True))


def test_two_backward_passes_over_one_graph_are_equal():
    case = Case(outer=(29, 16), options=DROPOUT)
    outputs = ops.lora_branches_grouped(*case.arguments(), seed=SEED, **DROPOUT)
    first = torch.autograd.grad(outputs, case.leaves, case.grads, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(outputs, case.leaves, case.grads)
    for one, other, copy in zip(first, second, kept, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, copy), "the second pass wrote into the first one's results"


@every_given_impl
def test_neither_pass_writes_into_what_it_is_given(impl):
    case = Case(outer=(29, 16), routed=True, options=DROPOUT)
    given = [*case.leaves, *case.weights, *case.biases, *case.grads, SEED]
    copies, versions = [t.detach().clone() for t in given], [t._version for t in given]
    outputs = ops.lora_branches_grouped(*case.arguments(), routing=case.routing, seed=SEED, impl=impl, **DROPOUT)
    kept = [(t, t.clone()) for t in saved_by(outputs[0])]
    torch.autograd.grad(outputs, case.leaves, case.grads, retain_graph=True)
    assert [t._version for t in given] == versions
    assert all(torch.equal(t.detach(), copy) for t, copy in [*zip(given, copies, strict=True), *kept])


def test_a_second_derivative_is_refused_by_name():
    case = Case(options=DROPOUT)
    y = ops.lora_branches_grouped(*case.arguments(), seed=SEED, **DROPOUT)[0]
    first = torch.autograd.grad(y.square().sum(), case.leaves, create_graph=True)
    plain = ops.lora_branches_grouped(*case.arguments(), seed=SEED, **DROPOUT)[0]
    expected = torch.autograd.grad(plain.square().sum(), case.leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, expected, strict=True))
    with pytest.raises(UserError, match=r"its gradient was differentiated.*take impl='reference'"):
        sum(gradient.square().sum() for gradient in first).backward()


def test_the_reference_has_second_derivatives():
    case = Case(lead=(3,), inner=4, outer=(3,), ranks=(2, 1), dtype=F64, options=DROPOUT)

    def function(x, a, b):
        parts = [[a, case.a[0][1]]], [[b, case.b[0][1]]]
        options = {"seed": SEED, "impl": "reference", **DROPOUT}
        return ops.lora_branches_grouped(x, case.weights, case.biases, *parts, **options)[0].square()

    assert torch.autograd.gradgradcheck(function, (case.x, case.a[0][0], case.b[0][0]))


def test_an_output_that_is_not_used_adds_nothing():
    case = Case(outer=(29, 16), options=DROPOUT)
    one = Case(outer=(29, 16), options=DROPOUT)
    y = ops.lora_branches_grouped(*case.arguments(), seed=SEED, **DROPOUT)[0]
    mine = torch.autograd.grad(y, case.leaves, case.grads[0])
    outputs = ops.lora_branches_grouped(*one.arguments(), seed=SEED, **DROPOUT)
    whole = torch.autograd.grad(outputs, one.leaves, [case.grads[0], torch.zeros_like(case.grads[1])])
    assert all(torch.equal(a, b) for a, b in zip(mine, whole, strict=True))


@warned_by_torch
@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_under_torch_compile_without_a_graph_break(dropout, impl, monkeypatch):
    monkeypatch.undo()
    case = Case(options={"dropout": dropout}, live=(True, False, True, True))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layer(x):
        arguments = x * 1.0, *case.arguments()[1:]
        return ops.lora_branches_grouped(*arguments, dropout=dropout, seed=SEED, impl=impl)[0] + 0.0

    y = layer(case.x)
    expected = case.run(impl)
    results = [y, *torch.autograd.grad(y, case.leaves, case.grads)]
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_dtype_of_outputs_and_gradients(impl):
    case = Case(options=DROPOUT)
    with torch.autocast(DEVICE, BF16):
        y = ops.lora_branches_grouped(*case.arguments(), dropout=0.25, seed=SEED, impl=impl)[0]
        linear = F.linear(case.x, case.weights[0], case.biases[0])
    assert y.dtype == linear.dtype == BF16
    grads = torch.autograd.grad(y, case.leaves, case.grads[0].to(BF16))
    assert {grad.dtype for grad in grads} == {torch.float32}
    for mine, exact in zip((y, *grads), case.exact(), strict=True):
        assert (mine.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_branches_and_routing_may_be_wider_than_the_base(impl):
    """PEFT keeps float32 adapters on a bfloat16 model."""
    case = Case(dtype=BF16, routed=True)
    case.a = [[part.detach().float().requires_grad_() for part in parts] for parts in case.a]
    case.routing = case.routing.detach().float().requires_grad_()
    y, dx, d_routing, *grads = case.run(impl)
    assert (y.dtype, dx.dtype, d_routing.dtype) == (BF16, BF16, torch.float32)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4 + [BF16] * 4


def test_without_a_compiled_core_products_are_plain_torch(monkeypatch):
    case = Case(options=DROPOUT)
    expected = case.run("torch")
    monkeypatch.setattr(dispatch, "core", lambda name: None)
    monkeypatch.setattr(dispatch, "BEST", {})
    dispatch.best.cache_clear()
    with pytest.warns(RuntimeWarning, match="runs on plain torch, many times slower in averaging and dropout"):
        results = case.run(None)
    dispatch.best.cache_clear()
    assert ops.last_path("lora_branches") == ops.last_path("lora_branches_backward") == "torch"
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, expected, strict=True))


def test_a_gpu_takes_what_was_faster_at_its_number_of_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "best", lambda device: {"cpu": "cpp", "cuda": "cuda"}[device])
    monkeypatch.setattr(dispatch, "missing", lambda impl, device: "")
    monkeypatch.setattr(dispatch, "_ready", lambda impl, device: True)
    limit = dispatch.TRITON_FROM_ROWS
    chosen = [
        dispatch.choose("lora_branches", "cuda", None, valid=dispatch.BRANCH_IMPLS, rows=rows)
        for rows in (limit - 1, limit)
    ]
    assert chosen == ["cuda", "triton"]
    assert dispatch.choose("lora_branches", "cuda", "cuda", valid=dispatch.BRANCH_IMPLS, rows=limit) == "cuda"
    assert dispatch.choose("lora_branches", "cpu", None, valid=dispatch.BRANCH_IMPLS, rows=limit) == "cpp"
    monkeypatch.setattr(dispatch, "_ready", lambda impl, device: False)
    assert dispatch.choose("lora_branches", "cuda", None, valid=dispatch.BRANCH_IMPLS, rows=limit) == "cuda"


def measured():
    """Name, rows and time over the frozen layer of CUDA and Triton at dropout 0.05, from the newest run on record."""
    newest = max(Path(__file__).parents[2].glob("bench/results/*/rows.jsonl"), key=lambda path: path.parent.name[-10:])
    found = [json.loads(line) for line in newest.read_text().splitlines()]
    found = [row for row in found if row.get("part") == "branches" and row.get("dropout") == 0.05 and "ratio" in row]
    pairs = {}
    for row in found:
        if row.get("path") in ("cuda", "triton"):
            pairs.setdefault((*row["shape"], row["rows"]), {})[row["path"]] = row["ratio"]
    return {key: pair for key, pair in pairs.items() if len(pair) == 2}


def test_the_rule_is_what_the_newest_run_on_a_gpu_measured():
    pairs = measured()
    assert len(pairs) >= 3
    for (*_, rows), pair in pairs.items():
        chosen = "triton" if rows >= dispatch.TRITON_FROM_ROWS else "cuda"
        assert pair[chosen] <= 1.02 * min(pair.values()), f"at {rows} rows {pair}: change dispatch.TRITON_FROM_ROWS"


def test_a_parameter_changed_before_backward_is_noticed():
    case = Case()
    y = ops.lora_branches_grouped(*case.arguments())[0]
    with torch.no_grad():
        case.a[0][3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_down_projections_that_lie_end_to_end_are_not_copied(monkeypatch):
    slab = torch.randn(32, 33, device=DEVICE)
    case = Case()
    joined = [slab[i : i + 8].requires_grad_() for i in range(0, 32, 8)]
    taken = []
    forward = torch.ops.cnext.lora_branches.default
    monkeypatch.setattr("cnext.ops.branches._forward", lambda *a: taken.append(a[3]) or forward(*a))
    apart = [part.detach().clone().requires_grad_() for part in joined]
    swapped = [joined[1], joined[0], *joined[2:]]
    results = [ops.lora_branches(case.x, case.weights[0], None, a, case.b[0]) for a in (joined, apart, swapped)]
    assert [whole.data_ptr() == slab.data_ptr() for whole in taken] == [True, False, False]
    assert torch.equal(results[0], results[1])
    order = [1, 0, 2, 3]
    expected = ops.lora_branches(case.x, case.weights[0], None, [apart[i] for i in order], case.b[0])
    assert torch.equal(results[2], expected)


GOOD = {
    "x": torch.ones(2, 6),
    "weight": torch.ones(4, 6),
    "bias": torch.ones(4),
    "a": [torch.ones(2, 6), torch.ones(1, 6)],
    "b": [torch.ones(4, 2), torch.ones(4, 1)],
}
BAD = {
    "x dtype": ({"x": torch.ones(2, 6, dtype=torch.int32)}, r"x is \(2, 6\) torch.int32"),
    "weight shape": ({"weight": torch.ones(4, 5)}, r"weight is \(4, 5\).*expected \(out, 6\) torch.float32"),
    "weight dtype": ({"weight": torch.ones(4, 6).half()}, "weight is .*float16.*expected .*torch.float32"),
    "weight live": (
        {"weight": torch.ones(4, 6, requires_grad=True)},
        r"requires a gradient; expected both frozen, see requires_grad_",
    ),
    "bias": ({"bias": torch.ones(5)}, r"bias is \(5,\).*expected \(4,\)"),
    "a": ({"a": [torch.ones(2, 6), torch.ones(1, 7)]}, r"a\[1\] is \(1, 7\).*expected \(1, 6\)"),
    "b": ({"b": [torch.ones(4, 3), torch.ones(4, 1)]}, r"b\[0\] is \(4, 3\).*expected \(4, 2\)"),
    "count": ({"b": [torch.ones(4, 2)]}, "a has 2 and b 1 branches; expected 2 in both"),
    "none": ({"a": [], "b": []}, "a has 0 and b 0 branches"),
    "device": ({"x": torch.ones(2, 6, device="meta")}, "weight is .*on cpu; expected .*on meta"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0; expected at least 0 and below 1"),
    "seed": (
        {"dropout": 0.5, "seed": torch.zeros(2, dtype=torch.int64)},
        r"seed is \(2,\).*expected \(1,\) torch.int64",
    ),
    "routing": ({"routing": torch.ones(2, 3)}, r"routing is \(2, 3\).*expected \(2, 2\)"),
    "impl": ({"impl": "fast"}, "unknown impl 'fast'; valid: cpp, cuda, triton, reference, torch"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_errors_name_what_is_wrong(wrong, message):
    with pytest.raises(UserError, match=message):
        ops.lora_branches(**(GOOD | wrong))


if DEVICE == "cuda":

    @pytest.mark.parametrize("impl", ["cuda", "triton"])
    def test_captured_in_a_graph(impl):
        case = Case(options=DROPOUT)
        expected = case.run(impl)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            results = case.run(impl)
        for result in results:
            result.zero_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


if shutil.which("g++"):

    @pytest.mark.slow
    @warned_by_torch
    def test_compiled_by_inductor(monkeypatch):
        """A whole adapter layer with generated code around the op: forward and backward as in plain torch."""
        monkeypatch.undo()
        case = Case()
        branches = {str(i): adapters.Branch(a.detach(), 29) for i, a in enumerate(case.a[0])}
        layer = adapters.AdapterLinear(torch.nn.Linear(33, 29), branches).to(DEVICE)
        layer.base.load_state_dict({"weight": case.weights[0], "bias": case.biases[0]})
        for branch, b in zip(branches.values(), case.b[0], strict=True):
            branch.B.data.copy_(b)
        compiled = torch.compile(lambda x: F.silu(layer(x * 1.0)), backend="inductor", fullgraph=True)
        leaves = [case.x, *(branch.A for branch in branches.values()), *(branch.B for branch in branches.values())]
        y, plain = compiled(case.x), F.silu(branches_reference.lora_branches(*case.arguments())[0])
        results = [y, *torch.autograd.grad(y, leaves, case.grads)]
        expected = [plain, *torch.autograd.grad(plain, case.leaves, case.grads)]
        for mine, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
