"""The averaging ops, each implementation against float64. CNEXT_TEST_DEVICE=cuda runs them on a GPU."""

import math
import mmap

import numpy
import pytest
import torch
from ops import averaging_cases
from ops.averaging_cases import BF16, CASES, DEVICE, F16, F32, IMPLS, LEVEL, SIZES, clone, inputs, oracle, written
from ops.tolerance import assert_as_accurate

from cnext import ops
from cnext.ops.averaging_table import OPS

DTYPES = [
    pytest.param(F32, F32, id="f32"),
    pytest.param(BF16, F32, id="bf16"),
    pytest.param(BF16, BF16, id="bf16-ema"),
    pytest.param(F16, F32, id="f16"),
    pytest.param(F16, F16, id="f16-ema"),
]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_instruction_set = averaging_cases.every_instruction_set
every_impl = pytest.mark.parametrize("impl", IMPLS)
INTERPRETED = IMPLS == ["triton"] and DEVICE == "cpu"


@every_case
@every_impl
@pytest.mark.parametrize(("param", "ema"), DTYPES)
def test_errs_no_more_than_plain_torch(case, impl, param, ema):
    given = inputs(case, param, ema)
    exact, exact_out = oracle(case, given)
    plain, result = clone(given), clone(given)
    plain_out, out = case.call(*plain, impl="reference"), case.call(*result, impl=impl)
    assert ops.last_path(case.op) == impl
    roundings = 2.0 if INTERPRETED else 1.0  # Triton's interpreter cuts float32 to bfloat16 instead of rounding
    for i, tensors in enumerate(result):
        for t, tensor in enumerate(tensors):
            if i in written(case):
                what = f"list {i}, size {SIZES[t]}"
                assert_as_accurate(tensor.cpu(), plain[i][t].cpu(), exact[i][t], what, roundings=roundings)
            else:
                assert torch.equal(tensor, given[i][t])
    if out is not None:
        numbers = torch.tensor([math.prod(size) for size in SIZES]).view(-1, *[1] * (out.ndim - 1))
        slack = 2e-6 * numbers * plain_out.cpu().double().abs().div(numbers.clamp(min=1)).clamp(min=1e-6)
        exact_out = exact_out.view_as(out)
        finite = exact_out.isfinite()
        assert torch.equal(out.cpu()[~finite], exact_out[~finite])
        error = (out.cpu() - exact_out)[finite].abs()
        allowed = 2 * (plain_out.cpu() - exact_out)[finite].abs() + slack.expand_as(exact_out)[finite]
        assert (error <= allowed).all()


@every_case
def test_reference_through_the_op_is_the_reference(case):
    given = inputs(case)
    exact, _ = oracle(case, given)
    case.call(*given, impl="reference")
    for i in written(case):
        for tensor, wide in zip(given[i], exact[i], strict=True):
            torch.testing.assert_close(tensor.cpu().double(), wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if "g" in c.roles])
@every_impl
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_reaches_a_state(case, impl, bad):
    given = inputs(case)
    gradients = [i for i, role in enumerate(case.roles) if role == "g"]
    for tensor in given[gradients[0]]:
        tensor.view(-1)[::2] = bad
    before = clone(given)
    case.call(*given, impl=impl)
    for i in written(case):
        for tensor, old in zip(given[i], before[i], strict=True):
            if i in gradients:
                continue
            assert tensor.isfinite().all()
            if case.op != "dema_step_":
                assert torch.equal(tensor.view(-1)[::2], old.view(-1)[::2])


@every_impl
@pytest.mark.parametrize("name", ["ema_step", "pema_step", "pema_literal", "dema_step"])
def test_theta_that_is_not_finite_leaves_the_average_alone(name, impl):
    case = CASES[name]
    given = inputs(case)
    for tensor in given[0]:
        tensor.view(-1)[::3] = math.nan
    ema = case.roles.index("e")
    before = clone(given)[ema]
    case.call(*given, impl=impl)
    for tensor, old in zip(given[ema], before, strict=True):
        assert torch.equal(tensor.view(-1)[::3], old.view(-1)[::3])


@every_impl
@pytest.mark.parametrize("name", ["ema_step", "pema_step", "pema_literal", "pema_literal_clamp", "dema_step"])
def test_an_average_that_equals_theta_stays_to_the_bit(name, impl):
    case = CASES[name]
    given = inputs(case)
    ema = case.roles.index("e")
    given[ema] = [tensor.clone() for tensor in given[0]]
    case.call(*given, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(given[ema], given[0], strict=True))


def tensor(*values: float, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    return [torch.tensor(values, dtype=dtype, device=DEVICE)]


@every_impl
def test_merge_where_one_fisher_information_is_zero(impl):
    theta, past = tensor(1.0, 1.0, 1.0), tensor(0.0, 1.0, 2.0)
    args = (theta, tensor(3.0, 3.0, 3.0), tensor(1.0, 0.0, 0.4), past)
    rows = ops.pema_merge_(*args, new_scale=1.0, c=5.0, damping=0.0, impl=impl)
    torch.testing.assert_close(theta[0].cpu(), torch.tensor([1.0, 3.0, 2.0]))
    torch.testing.assert_close(past[0].cpu(), torch.tensor([1.0, 1.0, 2.4]))
    torch.testing.assert_close(rows.cpu(), torch.tensor([[3, 1.5, 1.25, 0, 1]], dtype=torch.float64))


@every_impl
def test_per_step_rule_with_zero_and_denormal_gradients(impl):
    denormal = 1e-40
    fisher, ema = tensor(0.0, 0.0, 1.0), tensor(0.0, 0.0, 0.0)
    level = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    ops.pema_step_(tensor(1.0, 1.0, 1.0), tensor(0.0, denormal, denormal), fisher, ema, level, impl=impl)
    # Without any Fisher information the average stays (beta 1); with level 0 it is replaced where there is some.
    assert ema[0].tolist() == [0.0, 0.0, 1.0]
    assert fisher[0].tolist() == [0.0, 0.0, 1.0]
    ops.fisher_accumulate_(fisher, tensor(0.0, 1e-20, 1e-20), scale=1.0, impl=impl)
    assert fisher[0].tolist() == [0.0, pytest.approx(1e-40, rel=1e-4), 1.0]


@every_impl
@pytest.mark.parametrize(("guard", "low", "high"), [("fallback", 0.99, 0.99), ("clamp", 0.0, 1.0)])
def test_both_sides_of_the_literal_guard_are_taken_and_counted(impl, guard, low, high):
    theta = tensor(1.0, -1.0, 1.0, 2.0)
    ema = tensor(0.0, 0.0, 0.0, 2.0)
    gradient = tensor(3.0, 3.0, 0.1, 0.5)
    rows = ops.pema_literal_(theta, gradient, tensor(0, 0, 0, 0), ema, damping=1e-5, guard=guard, impl=impl)
    assert rows.tolist() == [[4.0, 1.0, 1.0, 2.0]]
    inside = 4 / (9 + 1e-5)
    expected = [1 - inside, -(1 - low), 1 - high, 2.0]
    torch.testing.assert_close(ema[0].cpu(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@every_impl
@pytest.mark.parametrize(
    ("scale", "alpha"), [(10.0, 2 * (1 + 20) / (20 * 20)), (0.1, 0.01)], ids=["formula", "fallback"]
)
def test_both_sides_of_the_dema_guard(impl, scale, alpha):
    theta, ema = tensor(scale, scale), tensor(0.0, 0.0)
    rows = ops.dema_step_(theta, tensor(scale, scale), ema, tensor(0.0, 0.0), impl=impl)
    torch.testing.assert_close(rows.cpu(), torch.full((1, 3), 2 * scale, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(ema[0].cpu(), torch.full((2,), alpha * scale), rtol=1e-5, atol=0)


@every_impl
def test_every_float16_is_read_as_what_it_is(impl):
    """By an average that takes its parameters over where they are finite, and by norms where they are not."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(F16).to(DEVICE)
    bad = [value.view(1) for value in every[~every.isfinite()][::64]]
    zeros = [torch.zeros_like(value) for value in bad]
    for name in every_instruction_set(impl):
        ema = torch.full(every.shape, 7.0, device=DEVICE)
        ops.ema_step_([every], [ema], beta=0.0, impl=impl)
        assert torch.equal(ema, torch.where(every.isfinite(), every.float(), 7.0)), name
        previous = [torch.zeros_like(value) for value in bad]
        norms = ops.dema_step_(zeros, bad, [value.float() for value in zeros], previous, impl=impl)
        torch.testing.assert_close(norms[:, 1], torch.cat(bad).double().abs(), rtol=0, atol=0, equal_nan=True)


@every_impl
@pytest.mark.parametrize("dtype", [F16] if INTERPRETED else [BF16, F16], ids=str)  # its interpreter cuts to bfloat16
def test_16_bits_are_written_as_torch_rounds(impl, dtype):
    """The float32 on, below and above every value of the dtype and every boundary where rounding turns."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()].double().sort().values
    largest = values[-1] * torch.tensor([1 + 2.0**-12, 1 + 2.0**-11, 1.25, 2.0], dtype=torch.float64)
    points = torch.cat([values, (values[:-1] + values[1:]) / 2, largest, -largest, torch.tensor([1e-45, 1e-40])])
    points = points.float()
    theta = torch.cat([points, *(points.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))])
    theta = theta[theta.isfinite()].to(DEVICE)
    for name in every_instruction_set(impl):
        ema = torch.zeros_like(theta, dtype=dtype)
        ops.ema_step_([theta], [ema], beta=0.0, impl=impl)
        expected = theta.to(dtype)
        assert torch.equal(ema, expected), name
        # Where the average is 0 its sign is that of a sum.
        assert torch.equal(ema.signbit() & (theta != 0), expected.signbit() & (theta != 0)), name


@every_impl
def test_float16_nan_and_inf_are_the_same_bits_everywhere(impl):
    theta = torch.zeros(2**16, dtype=F16, device=DEVICE)
    found = []
    for _ in every_instruction_set(impl):
        ema = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(F16).to(DEVICE)
        before = ema.clone()
        ops.ema_step_([theta], [ema], beta=0.5, impl=impl)
        assert torch.equal(ema.isnan(), before.isnan())
        assert torch.equal(ema.isinf(), before.isinf())
        found.append(ema.view(torch.int16))
    assert all(torch.equal(found[0], other) for other in found)


@every_case
@every_impl
def test_same_bits_over_runs_threads_and_instruction_sets(case, impl):
    given = inputs(case, seed=1)
    first = clone(given)
    out = case.call(*first, impl=impl)
    threads = torch.get_num_threads()
    for _ in every_instruction_set(impl):
        for run in range(3 if INTERPRETED else 8):
            if impl == "cpp":
                torch.set_num_threads(run % 4 + 1)
            again = clone(given)
            out_again = case.call(*again, impl=impl)
            assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
            assert out is None or torch.equal(out, out_again)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (6, 6), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_released_rule_is_the_released_formula(shape, dtype):
    """As stated in the paper's code: M = D^T F + lambda I in float32, everything else in the parameters' dtype."""
    torch.manual_seed(0)
    theta, ema, gradient = ((torch.randn(shape, dtype=torch.float64) * 0.1).to(dtype) for _ in range(3))
    difference = theta - ema
    matrix = torch.matmul(difference.t(), gradient * gradient)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = torch.linalg.inv(matrix.to(wide) + 0.3 * torch.eye(shape[1], dtype=wide)).to(dtype)
    alpha = torch.matmul(gradient + 1, inverse)
    expected = ema * alpha + theta * (1 - alpha)

    OPS["pema_released_"].reference([theta], [gradient], [ema], damping=0.3, fallback=0.99)
    torch.testing.assert_close(ema, expected, rtol=0, atol=0)
    assert (alpha > 1).any()


def test_released_rule_diverges_and_has_a_fallback():
    """Of equal values nothing is left in bfloat16, and a difference is multiplied by 99840."""
    torch.manual_seed(0)
    theta = [(torch.randn(8, 40, device=DEVICE) * 1e-3).bfloat16()]
    ema, gradient = [theta[0].clone()], [torch.zeros_like(theta[0])]
    ema[0][:, :20] += 0.01
    ops.pema_released_(theta, gradient, ema)
    assert ema[0][:, :20].min() > 500
    assert not ema[0][:, 20:].any()
    theta, gradient, ema = tensor(2.0), tensor(1.0), tensor(1.0)
    ops.pema_released_([theta[0][None]], [gradient[0][None]], [ema[0][None]], damping=-1.0)
    assert ema[0].item() == pytest.approx(0.99 * 1 + 0.01 * 2)


@pytest.mark.parametrize("shared", [False, True], ids=["own fisher", "exp_avg_sq as fisher"])
def test_reference_is_adamw_then_the_separate_op_to_the_bit(shared):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
    theta = [p.detach().clone() for p in parameters]
    m, v, fisher, ema = ([torch.zeros_like(p) for p in theta] for _ in range(4))
    other_fisher, other_ema = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, foreach=False)
    for step in range(1, 4):
        gradients = [torch.randn_like(p) for p in theta]
        arguments = (theta, gradients, m, v, None if shared else fisher, ema, LEVEL)
        numbers = {"step": step, "lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
        ops.adamw_pema_step_(*arguments, **numbers, impl="reference")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        if shared:
            other_fisher = [optimizer.state[p]["exp_avg_sq"].clone() for p in parameters]
        scale = 0.0 if shared else 1.0
        data = [p.detach() for p in parameters]
        ops.pema_step_(data, gradients, other_fisher, other_ema, LEVEL, scale=scale, impl="reference")
        assert all(torch.equal(a, b) for a, b in zip(theta, data, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ema, other_ema, strict=True))


if "cpp" in IMPLS:

    def test_offsets_are_64_bit():
        size = 2**31 + 5
        pages = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
        values = torch.from_numpy(numpy.frombuffer(pages, dtype=numpy.float32))
        values[0], values[-1] = 1.0, 2.0
        assert ops.sums([values], impl="cpp").item() == 3.0
