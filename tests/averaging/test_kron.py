"""PEMA with Kronecker factors: its groups, and pull and merge against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from cnext.averaging import Pema, PemaKron
from cnext.averaging.kron import groups_of
from cnext.errors import UserError

STEPS = 4
RATES = (0.25, 1.0, 0.5, 0.0)
"""Learning rates of the steps over the largest; the descent below does not follow them."""
SHAPES = {"q.one.A": (2, 5), "q.two.A": (3, 5), "q.one.B": (7, 2), "q.two.B": (7, 3), "norm": (5,)}
"""A layer with two branches side by side, and a vector."""


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradient(task: int, step: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * task + 10 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def steps(average: PemaKron, given: dict[str, nn.Parameter], task: int, moved: list[str], count: int = STEPS) -> None:
    """Steps of plain descent on the gradients above; parameters that are not ``moved`` have gradients too."""
    for step in range(average.step, average.step + count):
        for name, parameter in given.items():
            parameter.grad = gradient(task, step, name)
        average.update(rate=RATES[step])
        with torch.no_grad():
            for name in moved:
                given[name].add_(given[name].grad, alpha=-0.1)


def learn(average: PemaKron, given: dict[str, nn.Parameter], task: int, moved: list[str] | None = None) -> None:
    moved = list(given) if moved is None else moved
    average.frozen = {name: parameter for name, parameter in given.items() if name not in moved}
    average.begin_task({name: given[name] for name in moved}, STEPS)
    steps(average, given, task, moved)
    average.end_task()


SIDES = {"q.A": ("q.one.A", "q.two.A"), "q.B": ("q.one.B", "q.two.B"), "norm": ("norm",)}


def side_by_side(values: dict[str, torch.Tensor], side: str) -> torch.Tensor:
    """(n, r) in float64."""
    parts = [values[name].double() for name in SIDES[side]]
    return torch.cat([p.T if side == "q.A" else p.view(len(p), -1) for p in parts], 1)


def factors(task: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """s and R of a task by side, in the unit in which the diagonal of F has mean 1."""
    found = {}
    for side in SIDES:
        seen = [
            side_by_side({name: gradient(task, step, name) for name in SHAPES}, side)
            for step in range(STEPS // 2, STEPS)
        ]
        found[side] = sum(g.square().sum(1) for g in seen), sum(g.T @ g for g in seen)
    size = sum(len(s) * len(r) for s, r in found.values())
    scale = size / sum(s.sum() for s, _ in found.values())
    return {side: (s * scale, r * scale) for side, (s, r) in found.items()}


def blocks(pair: tuple[torch.Tensor, torch.Tensor], shrinkage: float) -> torch.Tensor:
    """(n, r, r): the block of every row."""
    s, r = pair
    shrunk = (1 - shrinkage) * r + shrinkage * torch.diag(r.diagonal())
    return s[:, None, None] * shrunk / r.trace()


@pytest.mark.parametrize("moved", [list(SHAPES), ["q.two.A", "q.two.B", "norm"]], ids=["all", "one branch frozen"])
def test_pull_and_merge_are_those_of_dense_blocks(moved: list[str]) -> None:
    given = parameters()
    average = PemaKron(pull=0.3, c=2.0, damping=0.05, shrinkage=0.25)
    learn(average, given, 0)
    start = {name: parameter.detach().double() for name, parameter in given.items()}
    learn(average, given, 1, moved)

    old, new, expected = factors(0), factors(1), {}
    for side, names in SIDES.items():
        ranks = {"q.one.A": 2, "q.two.A": 3, "q.one.B": 2, "q.two.B": 3, "norm": 1}
        live = torch.tensor([name in moved for name in names for _ in range(ranks[name])])
        m, f = blocks(old[side], 0.25)[:, live][:, :, live], blocks(new[side], 0.25)[:, live][:, :, live]
        first = side_by_side(start, side)
        theta = first.clone()
        for step in range(STEPS):
            pull = torch.eye(int(live.sum())) + RATES[step] * 0.3 * m
            pulled = torch.linalg.solve(pull, (theta - first)[:, live, None])[..., 0]
            grad = side_by_side({name: gradient(1, step, name) for name in SHAPES}, side)
            theta[:, live] = first[:, live] + pulled - 0.1 * grad[:, live]
        gap = (first - theta)[:, live]
        system = f + m / 2 + 0.05 * torch.eye(int(live.sum()))
        theta[:, live] += torch.linalg.solve(system, (m / 2 @ gap[..., None]))[..., 0]
        expected[side] = theta
    for side, theta in expected.items():
        torch.testing.assert_close(side_by_side(given, side).detach(), theta, rtol=1e-4, atol=1e-5)
    assert set(average.statistics) == set(moved)
    assert all(0 < mean < 1 for mean, _ in average.statistics.values())


def test_what_is_kept_is_the_sum_over_tasks_and_counts_as_said() -> None:
    given, average = parameters(), PemaKron()
    for task in range(2):
        learn(average, given, task)
    for side in SIDES:
        (s, r), (more_s, more_r) = factors(0)[side], factors(1)[side]
        torch.testing.assert_close(average.rows_old[side].double(), s + more_s, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(average.factor_old[side].double(), r + more_r, rtol=1e-5, atol=1e-5)
    kept = [tensor for name, tensor in average.state_dict().items() if name not in ("step", "steps")]
    assert sum(tensor.nbytes for tensor in kept) == average.kept_bytes(given) == 4 * (5 + 25 + 7 + 25 + 5 + 1)


def test_frozen_gradients_are_read_and_frozen_values_stay() -> None:
    whole, part = PemaKron(), PemaKron()
    learn(whole, parameters(), 0)
    given = parameters()
    before = given["q.one.A"].detach().clone()
    learn(part, given, 0, moved=["q.two.A", "q.two.B", "norm"])
    assert torch.equal(given["q.one.A"], before)
    for slot in ("rows_old", "factor_old"):
        one, other = whole.slots()[slot], part.slots()[slot]
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_stands_beside_a_trained_parameter() -> None:
    given = parameters()
    trained = {"q.one.B": given["q.one.B"]}
    others = {name: parameter for name, parameter in given.items() if name not in trained}
    assert PemaKron().beside(trained, given).keys() == PemaKron().beside(trained, others).keys() == {"q.two.B"}


def test_a_vector_is_averaged_as_by_pema() -> None:
    kron, plain = parameters()["norm"], parameters()["norm"]
    one, other = PemaKron(pull=0.0, c=3.0, damping=0.02), Pema(c=3.0, damping=0.02)
    for task in range(3):
        for average, vector in ((one, kron), (other, plain)):
            with average.task({"norm": vector}, steps=STEPS):
                steps(average, {"norm": vector}, task, ["norm"])
    torch.testing.assert_close(kron, plain, rtol=1e-5, atol=1e-6)
    assert one.statistics["norm"] == pytest.approx(other.statistics["norm"], rel=1e-4)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_rate_is_a_share_of_the_largest(rate: float) -> None:
    average = PemaKron()
    average.begin_task(parameters(), steps=1)
    with pytest.raises(UserError, match=r"expected rate, .* from 0 to 1, got"):
        average.update(rate=rate)
    assert average.step == 0


def test_strengths_of_zero_and_infinity_leave_training_alone() -> None:
    given, plain = parameters(), parameters()
    idle, average = PemaKron(pull=0.0, c=float("inf")), PemaKron()
    for task in range(2):
        learn(idle, given, task)
        for step in range(STEPS):
            with torch.no_grad():
                for name, parameter in plain.items():
                    parameter.add_(gradient(task, step, name), alpha=-0.1)
    assert all(torch.equal(given[name], plain[name]) for name in given)
    assert average.state_dict().keys() == {"step", "steps"}


@pytest.mark.parametrize("stop", [1, 3], ids=["first half", "second half"])
def test_a_task_with_frozen_parameters_resumes_to_the_bit(stop: int) -> None:
    moved = ["q.two.A", "q.two.B", "norm"]
    straight, halted = PemaKron(), PemaKron()
    one, other = parameters(), parameters()
    for average, given in ((straight, one), (halted, other)):
        learn(average, given, 0)
        average.frozen = {name: given[name] for name in SHAPES if name not in moved}
        average.begin_task({name: given[name] for name in moved}, STEPS)
        steps(average, given, 1, moved, stop)
    resumed = PemaKron()
    resumed.frozen = halted.frozen
    resumed.begin_task(halted.parameters, STEPS)
    resumed.load_state_dict(load(save(halted.state_dict())))
    for average, given in ((straight, one), (resumed, other)):
        steps(average, given, 1, moved, STEPS - stop)
        average.end_task()
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)
    state, again = straight.state_dict(), resumed.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_rows_that_are_not_finite_are_skipped() -> None:
    given, average = parameters(), PemaKron(pull=0.0)
    average.begin_task(given, 1)
    for name, parameter in given.items():
        parameter.grad = gradient(0, 0, name)
    given["q.one.B"].grad[3, 1] = float("nan")
    average.update()
    rows, factor = average.rows_new["q.B"], average.factor_new["q.B"]
    assert rows[3] == 0
    g = side_by_side({name: gradient(0, 0, name) for name in SHAPES}, "q.B")
    g[3] = 0
    torch.testing.assert_close(factor.double(), g.T @ g, rtol=1e-5, atol=1e-5)


def test_names_of_peft_and_of_branches_are_grouped() -> None:
    shapes = {
        "m.q.base.weight": (8, 8),
        "m.q.branches.text-general.A": (2, 8),
        "m.q.branches.text-expert.A": (2, 8),
        "m.k.lora_A.default.weight": (4, 8),
        "m.k.lora_B.default.weight": (16, 4),
        "m.k.lora_B.other.weight": (16, 4),
        "wide": (80, 70),
        "scalar": (),
    }
    groups = groups_of({name: torch.empty(shape) for name, shape in shapes.items()})
    assert {name: (len(g.names), g.axes[0], g.n, g.r, g.diagonal) for name, g in groups.items()} == {
        "m.q.base.weight": (1, 1, 8, 8, False),
        "m.q.A": (2, 0, 8, 4, False),
        "m.k.lora_A": (1, 0, 8, 4, False),
        "m.k.lora_B": (2, 1, 16, 8, False),
        "wide": (1, 1, 5600, 1, True),
        "scalar": (1, 1, 1, 1, True),
    }


def test_more_than_64_columns_are_several_groups() -> None:
    many = {f"q.{index}.A": torch.empty(30, 100) for index in range(5)}
    groups = groups_of(many)
    assert [(name, group.names) for name, group in groups.items()] == [
        ("q.A", ("q.0.A", "q.1.A")),
        ("q.A.1", ("q.2.A", "q.3.A")),
        ("q.A.2", ("q.4.A",)),
    ]


def test_what_does_not_fit_together_is_refused() -> None:
    apart = {"q.one.A": torch.zeros(2, 5), "q.two.A": torch.zeros(2, 6)}
    with pytest.raises(
        UserError, match=r"'q.one.A' is \(2, 5\) and 'q.two.A' is \(2, 6\); the matrices of a group share"
    ):
        groups_of(apart)
    assert len(groups_of(apart, r"(?P<own>.+)")) == 2
    for pattern, message in (("(", "no regular expression"), (".*", "no named group")):
        with pytest.raises(UserError, match=message):
            PemaKron(pattern=pattern)
    for bad in ({"pull": -1.0}, {"pull": float("nan")}, {"c": 0.0}, {"damping": 0.0}, {"shrinkage": 2.0}):
        with pytest.raises(UserError, match=f"PemaKron: {next(iter(bad))} is .*; expected a number from"):
            PemaKron(**bad)
    average = PemaKron()
    learn(average, parameters(), 0)
    fewer = {name: parameter for name, parameter in parameters().items() if name != "q.one.A"}
    with pytest.raises(
        UserError, match=r"'q.A' has a factor of shape \(3, 3\), and had \(5, 5\) before; a group has the same"
    ):
        average.begin_task(fewer, STEPS)
    given = parameters()
    average.begin_task(given, STEPS)
    given["norm"].grad = torch.ones(5)
    with pytest.raises(UserError, match="takes no losses"):
        average.update(torch.ones(1))
    with pytest.raises(UserError, match="end_task after 0 of 4 steps"):
        average.end_task()
