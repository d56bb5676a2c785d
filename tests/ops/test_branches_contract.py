"""What the branches op promises besides its numbers: autograd, torch.library, compile, checkpoints, memory, errors."""

import shutil

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
CHECKED = {
    "plain": {},
    "dropout": {"options": {**DROPOUT, "scale": 0.5}},
    "independent": {"options": {**DROPOUT, "independent": True}},
    "routed": {"routed": True, "options": DROPOUT},
    "grouped": {"outer": (3, 5), "options": DROPOUT},
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
    backward = ([torch.rand_like(y)], x, h, [weight], a, [b], [0, 6], [4, 6], True, False, *common)
    opcheck(torch.ops.cnext.lora_branches_backward.default, backward)
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
        return torch.autograd.grad(function(case.x), [case.x] if reentrant else case.leaves, case.grads)

    if not reentrant:
        again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    else:
        y = (torch.manual_seed(3), checkpoint(layer, case.x, use_reentrant=True))[1]
        y.backward(case.grads[0])
        again = [case.x.grad]
    assert all(torch.equal(one, other) for one, other in zip(again, gradients(layer), strict=True))


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
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters(impl):
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


def test_without_a_compiled_core_the_packed_passes_run_in_plain_torch(monkeypatch):
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
    "weight live": ({"weight": torch.ones(4, 6, requires_grad=True)}, r"requires a gradient; freeze .*requires_grad_"),
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
    "impl": ({"impl": "fast"}, "unknown impl 'fast'; valid: cpp, cuda, triton, torch, reference"),
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
