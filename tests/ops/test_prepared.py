"""Prepared calls: the op's own results, lists given per call, replaced storages, refusals, time on the host."""

from __future__ import annotations

import time

import pytest
import torch
from ops.averaging_cases import CASES, DEVICE, IMPLS, LEVEL, clone, inputs, rows, written
from torch import Tensor

from cnext import ops
from cnext.errors import UserError
from cnext.ops import checks
from cnext.ops.averaging_table import OPS
from cnext.ops.foreach import SAMPLE

EVERY = [*IMPLS, "reference"]


def lists(tensors: int = 3, *, seed: int = 0) -> list[list[Tensor]]:
    """theta, grad, fisher and ema, matrices of several shapes."""
    torch.manual_seed(seed)
    shapes = [(8, 33), (40, 8), (5,)] * (tensors // 3)
    made = [[torch.randn(shape, device=DEVICE) for shape in shapes] for _ in range(4)]
    made[2] = [tensor.square() for tensor in made[2]]
    return made


def level(tensors: int = 3) -> Tensor:
    return torch.full((tensors,), 0.1, dtype=torch.float64, device=DEVICE)


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("case", [case for name, case in CASES.items() if "clamp" not in name], ids=lambda c: c.op)
@pytest.mark.parametrize("opened", [False, True], ids=["every list kept", "lists given anew"])
def test_a_prepared_call_is_the_op_to_the_bit(case, impl, opened):
    op, given = OPS[case.op], inputs(case)
    plain, mine = clone(given), clone(given)
    extra = [] if not op.rows[0] else [LEVEL.to(DEVICE) if op.rows[1] == 1 else rows().to(DEVICE)]
    call = getattr(torch.ops.cnext, op.name)
    read = {name: i for i, name in enumerate(op.roles) if opened and name not in op.written}
    if len(read) == len(op.roles):
        del read[next(iter(read))]  # of one list at least, the shapes are known beforehand
    step = ops.Prepared(op, {n: None if n in read else mine[i] for i, n in enumerate(op.roles)}, impl)
    for _ in range(3):
        expected = call(*plain, *extra, **case.numbers, impl=impl)
        found = step.launch({name: mine[i] for name, i in read.items()}, extra, case.numbers)
        assert (expected is None) == (found is None)
        assert expected is None or torch.equal(expected, found)
        for i in written(case):
            assert same([plain[i]], [mine[i]])
    assert ops.last_path(op.name) == impl


def test_public_arguments_are_those_of_the_op():
    theta, grad, fisher, ema = lists()
    moments = [[tensor.square() for tensor in tensors] for tensors in (theta, grad)]
    numbers = {"step": 3, "lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "scale": 0.5}
    mine = clone([theta, grad, *moments, fisher, ema])
    plain = clone(mine)
    ops.prepare("adamw_pema_step_", *mine)(level(), **numbers)
    ops.adamw_pema_step_(*plain, level(), **numbers)
    assert same(mine, plain)
    shared = clone([theta, grad, *moments, ema])
    plain = clone(shared)
    del numbers["scale"]
    ops.prepare("adamw_pema_step_", *shared[:4], None, shared[4])(level(), **numbers)
    ops.adamw_pema_step_(*plain[:4], None, plain[4], level(), **numbers)
    assert same(shared, plain)
    mine, plain = clone([theta, grad, fisher, ema]), clone([theta, grad, fisher, ema])
    ops.prepare("pema_literal_", *mine)(guard="clamp", damping=0.7)
    ops.pema_literal_(*plain, guard="clamp", damping=0.7)
    assert same(mine, plain)
    with pytest.raises(UserError, match="unknown guard 'none'; valid: fallback, clamp"):
        ops.prepare("pema_literal_", *mine)(guard="none")


def test_a_missing_gradient_is_zero_and_another_layout_is_copied():
    theta, grad, fisher, ema = lists()
    plain = clone([theta, [grad[0], torch.zeros_like(grad[1]), grad[2]], fisher, ema])
    ops.pema_step_(*plain, level())
    turned = grad[0].t().contiguous().t()
    ops.prepare("pema_step_", theta, None, fisher, ema)(level(), grad=[turned, None, grad[2]])
    assert same([fisher, ema], plain[2:])
    every = ops.prepare("pema_step_", theta, None, fisher, ema)
    before = clone([fisher])
    every(level(), grad=[None] * 3)
    assert same([fisher], before)


def test_parameters_that_need_a_gradient_are_seen_to_change():
    theta = [torch.nn.Parameter(tensor) for tensor in lists()[0]]
    _, grad, fisher, ema = lists()
    moments = [[torch.zeros_like(tensor) for tensor in grad] for _ in range(2)]
    step = ops.prepare("adamw_pema_step_", theta, grad, *moments, fisher, ema)
    loss = theta[0].square().sum()
    step(level(), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_of_a_list_that_is_given_anew_is_kept(impl):
    import weakref

    theta, grad, fisher, ema = lists()
    step = ops.prepare("pema_step_", theta, None, fisher, ema, impl=impl)
    step(level(), grad=grad)
    gone = weakref.ref(grad[0])
    del grad
    assert gone() is None


def test_replaced_storages_are_noticed():
    theta, grad, fisher, ema = lists(6 * SAMPLE)
    first, step = (ops.prepare("pema_step_", theta, grad, fisher, ema) for _ in range(2))
    step(level(len(theta)))
    for tensor in ema:
        tensor.data = tensor.clone()
    with pytest.raises(UserError, match=r"the storage of ema\[0\] was replaced"):
        first(level(len(theta)))
    with pytest.raises(UserError, match=r"storage of ema\[\d+\] was replaced.* Prepare the call again"):
        step(level(len(theta)))
    step = ops.prepare("pema_step_", theta, grad, fisher, ema)
    theta[77].data = theta[77].clone()
    levels = level(len(theta))
    with pytest.raises(UserError, match=r"the storage of theta\[77\] was replaced"):
        any(step(levels) is None for _ in range(7))


def test_a_replaced_storage_is_not_reused_before_the_error():
    theta, grad, fisher, ema = lists(6 * SAMPLE)
    step = ops.prepare("pema_step_", theta, grad, fisher, ema)
    old = ema[100].data_ptr()
    ema[100].data = ema[100].clone()
    assert all(torch.empty_like(ema[100]).data_ptr() != old for _ in range(50))
    assert step.calls == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"grad": g[:2]}, "grad has 2 tensors; expected 3"),
        (lambda g: {"grad": [g[0].double(), *g[1:]]}, r"grad\[0\] has dtype torch.float64; expected torch.float32$"),
        (lambda g: {"grad": [g[1], *g[1:]]}, r"grad\[0\] has shape \(40, 8\); expected \(8, 33\)"),
        (
            lambda g: {"grad": [g[0].to_sparse(), *g[1:]]},
            r"grad\[0\] has layout torch.sparse_coo; expected torch.strided",
        ),
        (lambda g: {"grad": [1.0, *g[1:]]}, "a list of tensors holds a float; expected tensors"),
        (lambda g: {}, "grad is missing"),
        (lambda g: {"grad": g, "beta": 0.5}, "unknown argument 'beta'; expected grad, decay, scale"),
        (lambda g: {"grad": g, "theta": g}, "unknown argument 'theta'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    theta, grad, fisher, ema = lists()
    step = ops.prepare("pema_step_", theta, None, fisher, ema)
    for _ in range(2):  # before a first good call, and after it
        with pytest.raises(UserError, match=message):
            step(level(), **change(grad))
        step(level(), grad=grad)


def test_a_gradient_that_shares_memory_with_a_state_is_refused():
    theta, grad, fisher, ema = lists()
    with pytest.raises(UserError, match=r"grad\[1\] shares memory with another argument; fisher, ema|ema, fisher"):
        ops.prepare("pema_step_", theta, None, fisher, ema)(level(), grad=[grad[0], fisher[1], grad[2]])
    whole = torch.zeros(3 * 100, device=DEVICE)
    parts = [whole[i : i + 100] for i in (0, 100, 200)]
    step = ops.prepare("ema_step_", None, [parts[1]], impl="reference")
    for inside, theta in ((True, whole[50:150]), (True, whole[150:250]), (False, parts[0]), (False, parts[2])):
        if inside:
            with pytest.raises(UserError, match="shares memory"):
                step(theta=[theta], beta=0.5)
        else:
            step(theta=[theta], beta=0.5)


class Wrapper(Tensor):
    """Wraps a tensor as DTensor does: what looks like its memory is none."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class Named(torch.nn.Parameter):
    """A parameter of another class, with memory of its own."""


def test_wrappers_without_storage_are_refused():
    theta, grad, fisher, ema = lists()
    step = ops.prepare("pema_step_", theta, None, fisher, ema)
    with pytest.raises(UserError, match="a Wrapper has no storage that a kernel could read; expected plain tensors"):
        step(level(), grad=[grad[0], Wrapper(grad[1]), grad[2]])
    with pytest.raises(UserError, match="a Wrapper has no storage"):
        ops.prepare("ema_step_", [Wrapper(tensor) for tensor in theta], ema)
    plain = clone([theta, grad, fisher, ema])
    ops.prepare("pema_step_", [Named(tensor) for tensor in theta], None, fisher, ema)(level(), grad=grad)
    ops.pema_step_(*plain, level())
    assert same([fisher, ema], plain[2:])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("pema_stop_", [[]] * 4, "unknown op 'pema_stop_'; valid: "),
        ("pema_step_", [[]] * 3, "takes 4 lists, theta, grad, fisher, ema; got 3"),
        ("pema_step_", [None, None, None, None], "fisher is None; expected its tensors"),
        ("sums", [None], "tensors is None"),
        ("ema_step_", [None, []], "ema is empty"),
    ],
)
def test_prepare_says_what_it_expected(name, given, message):
    with pytest.raises(UserError, match=message):
        ops.prepare(name, *given)


def test_a_row_or_number_that_is_missing_is_named():
    theta, grad, fisher, ema = lists()
    with pytest.raises(UserError, match="level is missing"):
        ops.prepare("pema_step_", theta, grad, fisher, ema)()
    with pytest.raises(UserError, match="beta is missing"):
        ops.prepare("ema_step_", theta, ema)()


def test_a_prepared_call_takes_less_than_half_of_the_op_s_time():
    """At 1,680 tensors; the benchmark `-k host` has the times."""
    torch.manual_seed(0)
    made = [[torch.rand(1, device=DEVICE) for _ in range(1680)] for _ in range(4)]
    step, rows = ops.prepare("pema_step_", *made), level(1680)

    def best(call) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    # The kernel is in both, and so is what makes its results' memory.
    assert best(lambda: step(rows)) < best(lambda: ops.pema_step_(*made, rows)) / 2


@pytest.mark.parametrize("api", [object(), None])
def test_an_exchange_api_of_another_version_is_not_used(api, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", api, raising=False)
    assert checks._exchange.__wrapped__() is None


def test_tables_tell_apart_what_the_checks_tell_apart(monkeypatch):
    """With torch's exchange API, and without it as before torch 2.10."""
    x = torch.randn(6, 4)
    kinds = [x, x.half(), x.double(), torch.randn(6, 4, 1), x.t(), x[::2], torch.randn(4, 6).t(), x.to_sparse(), None]
    tables = [checks.table(kinds)]
    monkeypatch.setattr(checks, "_exchange", lambda: None)
    tables.append(checks.table(kinds))
    for table in tables:
        alike = [[bool((a[1:] == b[1:]).all()) for b in table] for a in table]
        assert [i for i, row in enumerate(table) if (row == -1).all()] == [5, 7, 8]
        assert table[:5, 0].tolist() == [tensor.data_ptr() for tensor in kinds[:5]]
        assert table[:5, 1].tolist() == [24] * 5
        pairs = {(i, j) for i, row in enumerate(alike) for j in range(i) if row[j]}
        assert pairs == {(7, 5), (8, 5), (8, 7)}
    theta, grad, fisher, ema = lists()
    plain = clone([theta, grad, fisher, ema])
    ops.prepare("pema_step_", theta, None, fisher, ema)(level(), grad=grad)
    ops.pema_step_(*plain, level())
    assert same([fisher, ema], plain[2:])
