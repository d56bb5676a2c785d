"""Benchmarks of the ops over Kronecker factors: ``pytest bench/ --benchmark-only -k kron``.

The rank-8 branches of LLaMA2-13B's seven linear layers, the four of a linear side by side: a group for the down
projections of each linear, and one for the up projections. Two decoder layers on a CPU, 40 on a GPU; and the tiny
backbone's 56 groups. The baseline is `fisher_accumulate_` on the same gradients, prepared, unless a row says otherwise.
"""

from __future__ import annotations

import copy

import pytest
import torch
from timing import DEVICE, GPU, SMALL
from torch import Tensor
from trials import Trials

from cnext import RunConfig, methods, ops
from cnext.config.plan import plan
from cnext.ops import dispatch, kron_reference
from cnext.training import trainer
from cnext.training.setup import Prepared
from cnext.training.trainer import TaskTrainer

WIDE, NARROW, RANK, BRANCHES = 13824, 5120, 8, 4
MATRICES = {"down": 0, "up": 1}
LINEARS = [(NARROW, NARROW)] * 4 + [(NARROW, WIDE)] * 2 + [(WIDE, NARROW)]
TINY = [(128, 128)] * 4 + [(128, 344)] * 2 + [(344, 128)]
SIZES = {
    "13B": (LINEARS, 40 if GPU else 1 if SMALL else 2),
    "tiny": (TINY, 1 if SMALL else 4),
}
"""The linear layers of a decoder layer, and how many decoder layers."""
NUMBERS = {"kron_accumulate_": {}, "kron_pull_": {"weight": 1e-6}, "kron_merge_": {"c": 5.0, "damping": 1e-3}}


class Groups:
    """Buffers of the ops. layout: 1 for (n, rank), 0 for (rank, n), None as the branches have them."""

    def __init__(self, size: str, layout: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        linears, layers = SIZES[size]
        places = [(n, axis) for _ in range(layers) for sides in linears for n, axis in zip(sides, (0, 1), strict=True)]
        self.rows = [n for n, _ in places]
        self.parts = [BRANCHES] * len(places)
        self.axes = [axis if layout is None else layout for _, axis in places for _ in range(BRANCHES)]
        self.shapes = [
            (n, RANK) if axis else (RANK, n)
            for n, axis in zip([n for n in self.rows for _ in range(BRANCHES)], self.axes, strict=True)
        ]
        self.elements = sum(a * b for a, b in self.shapes)
        self.dtype = dtype

    def matrices(self, scale: float) -> list[Tensor]:
        return [(torch.randn(shape, device=DEVICE) * scale).to(self.dtype) for shape in self.shapes]

    def fisher(self) -> tuple[list[Tensor], list[Tensor]]:
        """rows and factor."""
        few = [torch.randn(64, RANK * BRANCHES, device=DEVICE) for _ in self.rows]
        return [torch.rand(n, device=DEVICE) for n in self.rows], [x.T @ x / 64 for x in few]

    def lists(self, op: str) -> list[list[Tensor]]:
        torch.manual_seed(0)
        if op == "kron_accumulate_":
            return [*self.fisher(), self.matrices(1e-3)]
        if op == "kron_pull_":
            rows, factors = self.fisher()
            found = [torch.linalg.eigh(factor) for factor in factors]
            values, vectors = [values for values, _ in found], [vectors.contiguous() for _, vectors in found]
            return [self.matrices(1e-2), self.matrices(1e-2), rows, values, vectors]
        return [self.matrices(1e-2), self.matrices(1e-2), *self.fisher(), *self.fisher()]

    def call(self, op: str, lists: list[list[Tensor]]) -> None:
        getattr(ops, op)(*lists, self.parts, self.axes, **NUMBERS[op])

    def check(self, op: str, lists: list[list[Tensor]]) -> None:
        """Compares an op with the reference, on the first decoder layer's groups."""
        few, matrices = 14, 14 * BRANCHES
        short = [one[: matrices if len(one) == len(self.shapes) else few] for one in lists]
        plain, result = copy.deepcopy(short), copy.deepcopy(short)
        getattr(kron_reference, op)(*plain, self.parts[:few], self.axes[:matrices], **NUMBERS[op])
        getattr(ops, op)(*result, self.parts[:few], self.axes[:matrices], **NUMBERS[op])
        for one, other in zip(result, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


BYTES = {"kron_accumulate_": 1, "kron_pull_": 3, "kron_merge_": 3}
"""Of a matrix element that is read or written once, in elements."""
OPERATIONS = {"kron_accumulate_": RANK * BRANCHES, "kron_pull_": 4 * RANK * BRANCHES}
"""For an element, a multiplication and an addition as two: half of G^T G, and two products with eigenvectors."""


def row(race, groups: Groups, op: str, **options: object) -> None:
    lists = groups.lists(op)
    groups.check(op, lists)
    fisher = ops.prepare(
        "fisher_accumulate_", [torch.zeros(shape, device=DEVICE) for shape in groups.shapes], groups.matrices(1e-3)
    )
    race.run(
        lambda: groups.call(op, lists),
        lambda: fisher(scale=1.0),
        parameters=groups.elements,
        bytes_per_parameter=BYTES[op] * lists[0 if op != "kron_accumulate_" else 2][0].element_size(),
        operations_per_parameter=OPERATIONS.get(op),
        path=ops.last_path(op),
        graph=False,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", [1, 0], ids=["rows", "transposed"])
def test_kron_accumulate(race, layout, dtype):
    row(race, Groups("13B", layout, dtype), "kron_accumulate_")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["kron_accumulate_", "kron_pull_"])
def test_kron_step(race, op, size):
    """What a training step adds, with the host's part."""
    row(race, Groups(size), op)


def test_kron_merge(race):
    """Once a task."""
    row(race, Groups("13B"), "kron_merge_", rounds=3)


@pytest.mark.parametrize("size", SIZES)
def test_kron_accumulate_and_pull(race, size):
    """The two ops of a step together; the baseline is the same in plain torch."""
    groups = Groups(size)
    lists = {op: groups.lists(op) for op in ("kron_accumulate_", "kron_pull_")}
    plain = copy.deepcopy(lists)
    race.run(
        lambda: [groups.call(op, one) for op, one in lists.items()],
        lambda: [
            getattr(kron_reference, op)(*one, groups.parts, groups.axes, **NUMBERS[op]) for op, one in plain.items()
        ],
        rounds=10,
        path=dispatch.choose("kron_pull_", DEVICE, None),
    )


def second_task(trials: Trials, **hyperparameters: object) -> TaskTrainer:
    """`mage` on the tiny backbone, in the half of its second task in which the Fisher information is accumulated."""
    planned = plan(RunConfig(method="mage", hyperparameters=hyperparameters))
    method, backbone = methods.load("mage")(**planned.hyperparameters), copy.deepcopy(trials.backbone)
    method.setup(backbone, [planned.suite.task(name) for name in planned.order], torch.Generator().manual_seed(0))
    ready, steps = Prepared(trials.samples, backbone, method, {}, trials.encoded), 10_000
    for name, count in zip(planned.order, (4, steps), strict=False):
        task = planned.suite.task(name)
        started = trainer.begin(planned, ready, task, method.trainable(task), trials.samples["train"][name], count, {})
        backbone.train()
        while started.step < 4 and count == 4:
            started.train_step()
        if count == 4:
            started.finish()
    method.rule.step = started.step = steps // 2
    return started


@pytest.mark.parametrize(
    "options",
    [{}, {"trains": "all", "a": "trained"}, {"trains": "roles", "a": "trained"}],
    ids=["mage", "A trained", "A trained and frozen branches' gradients"],
)
def test_kron_train_step(race, options):
    """A whole training step; the baseline is that of ``--mage.average pema`` with the same branches trained."""
    trials = Trials(RunConfig(preset="smoke"))
    kron, pema = second_task(trials, **options), second_task(trials, **options | {"average": "pema"})
    race.run(kron.train_step, pema.train_step, rounds=30, path="cpp")
