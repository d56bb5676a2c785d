"""Averaging rules on a small model: values, tasks as contexts, resuming, evaluation, dtypes, errors."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cnext.averaging import RULES, Constant, Dema, Pema, PemaLiteral, PemaReleased, PemaStep, Rule
from cnext.averaging.base import mean_and_std
from cnext.errors import UserError

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:pema-literal")
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(task: int, step: int) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * task + step))


def losses(net: nn.Module, task: int, step: int) -> torch.Tensor:
    return (net(batch(task, step)) - task).square().sum(1)


def train(net, average, tasks=2, before_step=None, seen=None):
    """Trains by AdamW and returns the last task's statistics; ``seen`` collects parameters and gradients."""
    statistics = {}
    for task in range(tasks):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        average.begin_task(dict(net.named_parameters()), STEPS)
        for step in range(STEPS):
            if before_step:
                average = before_step(average, task, step)
            losses(net, task, step).mean().backward()
            if seen is not None:
                seen.append({n: (p.detach().clone(), p.grad.clone()) for n, p in net.named_parameters()})
            average.update()
            optimizer.step()
            optimizer.zero_grad()
        if seen is not None:
            seen.append({n: (p.detach().clone(), None) for n, p in net.named_parameters()})
        statistics = average.end_task()
    return statistics, average


@every_rule
@pytest.mark.parametrize("stop", [(0, 2), (1, 0), (1, 4)], ids=["first half", "task start", "second half"])
def test_stopped_saved_and_continued_is_bitwise_the_same(rule, stop, tmp_path):
    def restart(average, task, step):
        if (task, step) != stop:
            return average
        save_file(average.state_dict(), tmp_path / "state.safetensors")
        fresh = rule()
        fresh.begin_task(average.parameters, STEPS)
        fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
        return fresh

    straight, resumed = model(), model()
    statistics, average = train(straight, rule())
    statistics_again, average_again = train(resumed, rule(), before_step=restart)
    assert statistics == statistics_again
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    state, again = average.state_dict(), average_again.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)


@every_rule
def test_a_task_as_a_context_is_begin_and_end_to_the_bit(rule):
    explicit, inside = model(), model()
    explicit[2].bias.requires_grad_(False)
    inside[2].bias.requires_grad_(False)
    one, other = rule(), rule()
    for task in range(2):
        one.begin_task({n: p for n, p in explicit.named_parameters() if p.requires_grad}, STEPS)
        with other.task(inside, steps=STEPS) as entered:
            assert entered is other
            assert "2.bias" not in other.parameters
            for net, average in ((explicit, one), (inside, other)):
                optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
                for step in range(STEPS):
                    optimizer.zero_grad()
                    losses(net, task, step).mean().backward()
                    average.update()
                    optimizer.step()
        statistics = one.end_task()
        assert other.statistics == statistics == one.statistics
        assert all(torch.equal(a, b) for a, b in zip(explicit.parameters(), inside.parameters(), strict=True))
    state, same = one.state_dict(), other.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[key], same[key]) for key in state)


@every_rule
def test_an_exception_in_a_task_leaves_the_parameters(rule):
    net, fresh = model(), model()
    average = rule()
    with pytest.raises(KeyError, match="stop"), average.task(net, steps=STEPS):  # noqa: PT012
        for step in range(STEPS - 1):
            losses(net, 0, step).mean().backward()
            average.update()
            net[0].weight.data.add_(1.0)
        before = [p.detach().clone() for p in net.parameters()]
        average.swap_in()
        raise KeyError("stop")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert average.statistics == {}
    assert not average.parameters
    # The next tasks are those of an average that has seen nothing.
    net.load_state_dict(fresh.state_dict())
    net.zero_grad()
    assert train(net, average)[0] == train(fresh, rule())[0]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_task_contexts_are_neither_nested_nor_entered_twice():
    net, average = model(), Constant()
    net[0].weight.grad = torch.ones(4, 5)
    task = average.task(net, steps=1)
    with task:
        with pytest.raises(UserError, match="tasks cannot be nested; call end_task"), average.task(net, steps=1):
            pass
        average.update()
    with pytest.raises(UserError, match=r"entered before; call average.task\(...\) again"), task:
        pass
    with pytest.raises(UserError, match="end_task after 1 of 4 steps"), (pema := Pema()).task(net, steps=4):
        pema.update()
    assert pema.steps == 0, "a task whose end failed is closed"


def test_rules_are_those_of_the_literal_type():
    assert {rule.name for rule in RULES.values()} == set(RULES) == set(get_args(Rule))
    assert all(name == rule.name for name, rule in RULES.items())


@every_rule
def test_evaluation_leaves_training_alone_to_the_bit(rule):
    def evaluate(average, task, step):
        before = [p.detach().clone() for p in average.parameters.values()]
        with average.for_eval():
            inside = [p.detach().clone() for p in average.parameters.values()]
            for call in (average.swap_in, average.end_task, average.state_dict, average.update):
                with pytest.raises(UserError, match="swapped in"):
                    call()
        assert all(torch.equal(a, b) for a, b in zip(before, average.parameters.values(), strict=True))
        if step > 2 and average.evaluated():
            assert not all(torch.equal(a, b) for a, b in zip(before, inside, strict=True))
        return average

    plain, watched = model(), model()
    train(plain, rule(), tasks=1)
    train(watched, rule(), tasks=1, before_step=evaluate)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_pema_is_the_rule_written_out():
    seen, net = [], model()
    statistics, average = train(net, Pema(c=3.0, damping=0.01), seen=seen)
    fisher_old = {}
    for task in range(2):
        steps = seen[task * (STEPS + 1) :][: STEPS + 1]
        fisher = {n: sum(step[n][1].double().square() for step in steps[STEPS // 2 : STEPS]) for n in steps[0]}
        mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        for name, f in fisher.items():
            f /= mean
            old = fisher_old.get(name, torch.zeros_like(f))
            beta = (old / 3) / (f + old / 3 + 0.01)
            if task == 1:
                start, end = steps[0][name][0].double(), steps[STEPS][name][0].double()
                merged = beta * start + (1 - beta) * end
                torch.testing.assert_close(dict(net.named_parameters())[name].double(), merged, rtol=1e-5, atol=1e-7)
                assert statistics[name] == pytest.approx((beta.mean().item(), beta.std(correction=0).item()), rel=1e-4)
            fisher_old[name] = old + f
    for name, value in average.fisher_old.items():
        torch.testing.assert_close(value.double(), fisher_old[name], rtol=1e-5, atol=1e-7)


def test_pema_first_task_and_parameters_that_a_task_leaves_out():
    plain, averaged = model(), model()
    train(plain, RULES["none"](), tasks=1)
    statistics, average = train(averaged, Pema(), tasks=1)
    assert set(statistics.values()) == {(0.0, 0.0)}
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), averaged.parameters(), strict=True))
    kept = average.fisher_old["0.weight"].clone()
    average.begin_task({"2.bias": averaged[2].bias}, 1)
    averaged(batch(1, 0)).sum().backward()
    average.update()
    assert average.end_task()["2.bias"][0] > 0
    assert torch.equal(average.fisher_old["0.weight"], kept)


def test_pema_keeps_the_old_where_a_parameter_has_no_gradient_and_stays_finite():
    weight, used = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    average = Pema(damping=0.0)
    for gradient, value in ((torch.ones(3), 2.0), (None, 5.0)):
        average.begin_task({"w": weight, "used": used}, 1)
        weight.grad, used.grad = gradient, torch.ones(3)
        average.update()
        weight.data.fill_(value)
        average.end_task()
    assert weight.tolist() == [2.0] * 3


def each_step(seen, task):
    """(theta, gradient) of "0.weight" at every step of a task in float64, and the last theta."""
    steps = seen[task * (STEPS + 1) :][: STEPS + 1]
    pairs = [tuple(x.double() for x in step["0.weight"]) for step in steps[:-1]]
    return pairs, steps[-1]["0.weight"][0].double()


def run_rule(average):
    seen, net = [], model()
    train(net, average, tasks=1, seen=seen)
    return net[0].weight.detach().double(), *each_step(seen, 0)


def test_constant_keeps_its_retention():
    result, pairs, last = run_rule(Constant(retention=0.3))
    beta = 0.3 ** (1 / STEPS)
    ema = pairs[0][0]
    for theta, _ in [*pairs, (last, None)]:
        ema = beta * ema + (1 - beta) * theta
    torch.testing.assert_close(result, ema, rtol=1e-5, atol=1e-7)
    start, average = nn.Parameter(torch.ones(1)), Constant(retention=0.3)
    with average.task({"w": start}, steps=7):
        for _ in range(7):
            average.update()
            start.data[:] = 0.0
    # The first update averages the starting value with itself; the last result, at the end, is one more.
    assert start.item() == pytest.approx(0.3)


@pytest.mark.parametrize("options", [{"kappa": 4.0}, {"retention": (4 / 5) ** STEPS}], ids=["kappa", "retention"])
def test_pema_step_is_the_rule_written_out(options):
    """Where all squared gradients are equal, beta is kappa / (1 + kappa), which keeps the retention in all steps."""
    result, pairs, last = run_rule(PemaStep(**options))
    ema, fisher, level = pairs[0][0], torch.zeros(4, 5, dtype=torch.float64), 0.0
    for theta, gradient in [*pairs, (last, torch.zeros(4, 5))]:
        fisher = fisher + gradient.square()
        beta = level / (fisher + level)
        ema = beta * ema + (1 - beta) * theta
        level = 4.0 * fisher.mean()
    torch.testing.assert_close(result, ema, rtol=1e-5, atol=1e-7)


def test_dema_is_the_rule_written_out():
    result, pairs, last = run_rule(Dema(factor=0.05))
    ema, previous, inside = pairs[0][0], pairs[0][1], 0
    for theta, gradient in pairs[1:]:
        a, b, c = ((theta - ema).abs().sum(), gradient.abs().sum(), (gradient - previous).abs().sum())
        alpha = 0.05 * (1 + b) / (a * c)
        inside += bool(0 < alpha < 1)
        alpha = alpha if 0 < alpha < 1 else 0.01
        ema, previous = (1 - alpha) * ema + alpha * theta, gradient
    assert inside
    torch.testing.assert_close(result, 0.99 * ema + 0.01 * last, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("guard", "below", "above"), [("fallback", 0.99, 0.99), ("clamp", 0.0, 1.0)])
def test_literal_rule_is_the_equation_written_out(guard, below, above):
    average = PemaLiteral(guard=guard, damping=0.5)
    result, pairs, _ = run_rule(average)
    ema = pairs[0][0]
    for theta, gradient in pairs:
        beta = (gradient + 1) / ((theta - ema) * gradient.square() + 0.5)
        beta = torch.where(beta <= 0, below, torch.where(beta >= 1, above, beta))
        ema = beta * ema + (1 - beta) * theta
    torch.testing.assert_close(result, ema, rtol=1e-4, atol=1e-6)
    assert 0 < average.inside < 1


@pytest.mark.parametrize("guard", ["fallback", "clamp"])
def test_literal_rule_warns_where_its_guard_decides(guard):
    weight = nn.Parameter(torch.zeros(100))
    average = PemaLiteral(guard=guard)
    average.begin_task({"w": weight}, 2)
    for _ in range(2):
        weight.grad = torch.full((100,), 1e-3)
        average.update()
        weight.data += 1e-3
    with pytest.warns(RuntimeWarning, match=r"100.00% of beta lay outside \(0, 1\)") as warned:
        average.end_task()
    assert warned[0].filename == __file__, "the line that called end_task is shown"
    torch.testing.assert_close(weight.data, torch.full((100,), 1e-5 if guard == "fallback" else 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_released_loop_has_two_paths(dtype, micro_batches):
    """Vectors by the loop stated again: a copy at the first micro-batch, and then in float32 an exception, which mixes
    0.99 of the average with the parameters, in bfloat16 the formula."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(3, 5) * 0.1).to(dtype))
    average, kept, steps = PemaReleased(), None, 4
    average.begin_task({"w": weight}, steps * micro_batches)
    for _ in range(steps):
        for micro_batch in range(micro_batches):
            weight.grad = (torch.randn(3, 5) * 0.1).to(dtype)
            if micro_batch == micro_batches - 1:
                weight.data -= (0.02 * torch.randn(3, 5)).to(dtype)
            average.update()
            theta, gradient = weight.data, weight.grad
            if kept is None:
                kept = theta.clone()
                continue
            try:
                if dtype == torch.float32:
                    raise RuntimeError("expected m1 and m2 to have the same dtype")
                matrix = (theta - kept).t() @ (gradient * gradient) + 1e-5 * torch.eye(5)
                alpha = (gradient + 1) @ torch.linalg.inv(matrix).to(dtype)
                kept = kept * alpha + theta * (1 - alpha)
            except RuntimeError:
                kept = 0.99 * kept + 0.01 * theta
    trained = weight.detach().clone()
    average.end_task()
    torch.testing.assert_close(weight.data, kept, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    assert (weight.data.abs().max() > 100) == (dtype == torch.bfloat16)
    assert not torch.equal(weight.data, trained)


def test_a_released_average_that_is_not_a_number_is_not_used():
    weight, average = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)), PemaReleased()
    with average.task({"w": weight}, steps=3):
        for factor in (1.0, 1e30, 1e30):
            weight.grad = torch.full_like(weight, factor)
            weight.data += 1
            average.update()
        assert average.ema["w"].isnan().any()
    assert torch.equal(weight.data, torch.full_like(weight.data, 4.0))


def test_dema_after_the_step_is_the_released_loop():
    """theta* begins with the first step's result; the second step mixes 0.01, as there is no earlier gradient."""
    torch.manual_seed(0)
    weight, average = nn.Parameter(torch.randn(4, 3)), Dema(after_optimizer=True)
    assert average.place == "after optimizer"
    kept = previous = None
    average.begin_task({"w": weight}, 5)
    for _ in range(5):
        weight.grad = torch.randn(4, 3)
        weight.data -= 2 * torch.rand(4, 3) * weight.grad
        average.update()
        theta, gradient = weight.data.double(), weight.grad.double()
        if kept is None:
            kept = theta.clone()
        else:
            distance, change = (theta - kept).abs().sum(), (gradient - previous).abs().sum()
            alpha = 2 * (1 + gradient.abs().sum()) / (distance * change)
            alpha = alpha if 0 < alpha < 1 else 0.01
            kept = (1 - alpha) * kept + alpha * theta
        previous = gradient.clone()
    average.end_task()
    torch.testing.assert_close(weight.data.double(), kept, rtol=1e-5, atol=1e-6)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_and_other_memory_layouts(rule, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(dtype)
    net = net.to(memory_format=torch.channels_last)
    average = rule()
    average.begin_task(dict(net.named_parameters()), 2)
    for _ in range(2):
        net(torch.ones(1, 3, 4, 4, dtype=dtype)).sum().backward()
        average.update()
    average.end_task()
    assert all(p.dtype == dtype for p in net.parameters())


@pytest.mark.parametrize("rule", [PemaStep, PemaLiteral, Dema, Constant])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_average_of_a_float16_model_in_either_dtype(rule, dtype):
    """Parameters that stand still are what their average is, to the bit; the state can be saved and taken back."""
    torch.manual_seed(0)
    net, average, other = nn.Linear(16, 3).half(), rule(dtype=dtype), rule(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    average.begin_task(dict(net.named_parameters()), 2)
    other.begin_task(dict(net.named_parameters()), 2)
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.rand_like(parameter) * 1e-3
        average.update()
    state = average.state_dict()
    assert {t.dtype for name, t in state.items() if name.startswith("ema.")} == {dtype}
    other.load_state_dict(state)
    other.end_task()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_average_of_another_16_bit_dtype_is_refused():
    net, average = nn.Linear(4, 2).half(), PemaStep(dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"theta has dtype torch\.float16; expected torch\.float32 or torch\.bfloat16, that of ema"
    ):
        average.begin_task(dict(net.named_parameters()), 1)


@every_rule
def test_a_gradient_that_is_not_finite_never_reaches_the_average(rule):
    net, average = model(), rule()
    average.begin_task(dict(net.named_parameters()), 2)
    for _ in range(2):
        losses(net, 0, 0).mean().backward()
        for parameter in net.parameters():
            parameter.grad.view(-1)[0] = float("nan")
            parameter.grad.view(-1)[1] = float("inf")
        average.update()
    average.end_task()
    assert all(p.isfinite().all() for p in net.parameters())


def test_misuse_is_refused():
    weight = nn.Parameter(torch.ones(3))
    average = Pema()
    for call in (average.update, average.end_task):
        with pytest.raises(UserError, match="no task is open; call begin_task first"):
            call()
    with pytest.raises(UserError, match="'step' is missing"):
        average.load_state_dict({})
    with pytest.raises(UserError, match="parameters is a list; expected a module, or a mapping"):
        average.begin_task([weight], 1)
    with pytest.raises(UserError, match="no parameter of the module requires a gradient"):
        average.begin_task(model().requires_grad_(False), 1)
    with pytest.raises(UserError, match="steps is 0; expected a whole number of at least 1"):
        average.begin_task({"w": weight}, 0)
    average.begin_task({"w": weight}, 2)
    with pytest.raises(UserError, match=r"a task is open.*call end_task or abort_task first"):
        average.begin_task({"w": weight}, 2)
    weight.grad = torch.ones(3)
    average.update()
    with pytest.raises(UserError, match="end_task after 1 of 2 steps"):
        average.end_task()
    state = average.state_dict()
    with pytest.raises(UserError, match="saved in a task of 2 steps, and the open task has 0"):
        Pema().load_state_dict(state)
    other = Pema()
    other.begin_task({"v": nn.Parameter(torch.ones(3))}, 2)
    with pytest.raises(UserError, match=r"no fisher_old for 'v', which the open task trains"):
        other.load_state_dict(state)
    with pytest.raises(
        UserError, match=r"'theta_start.w' is not a state of rule|'fisher_old.w' is not a state of rule"
    ):
        Constant().load_state_dict(state)
    with pytest.raises(UserError, match="swap_out: the average is not swapped in"):
        average.swap_out()
    for bad in (
        lambda: Pema(c=0),
        lambda: Constant(retention=1.0),
        lambda: PemaStep(kappa=0),
        lambda: PemaLiteral("no"),
    ):
        with pytest.raises(UserError):
            bad()


def test_an_average_before_and_in_a_task():
    average = Constant()
    assert (average.step, average.steps, average.statistics) == (0, 0, {})
    weight = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError):
        average.task({"w": weight}, 2)
    with pytest.raises(TypeError):
        average.begin_task({"w": weight}, 3, True)
    average.begin_task({"w": weight}, 3)
    for rate in (0, 0.5, 1):
        weight.grad = torch.ones(3)
        average.update(rate=rate)
        assert average.rate == rate
    average.end_task()
    average.begin_task({"w": weight}, 1)
    weight.grad = torch.ones(3)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="the learning rate over the schedule's largest, from 0 to 1, got"):
            average.update(rate=rate)
    assert average.step == 0


def test_statistics_of_nothing_are_zero():
    assert mean_and_std([0.0, 0.0, 0.0]) == (0, 0)
    assert mean_and_std([4.0, 6.0, 14.0]) == (1.5, pytest.approx((14 / 4 - 1.5**2) ** 0.5))
