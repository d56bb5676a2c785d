"""Sets of low-rank branches that methods share: one per modality role, or one per task."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters import BranchRole, branch_roles, roles_of
from cnext.adapters.bases import sizes
from cnext.adapters.targets import linear_targets
from cnext.averaging import RULES, PemaKron
from cnext.averaging.pooling import pooled
from cnext.distributed.wrapped_names import without_wrappers
from cnext.errors import UserError, unknown
from cnext.methods.parts.low_rank import LowRank
from cnext.tasks.base import Task


@dataclass
class RoleBranches(LowRank):
    """One branch per modality role, and a moving average: the composition behind MAGE, its ablations and variants.

    A method of this family declares on which sides a modality has a branch, whether a task trains only those of its own
    modalities, the default averaging rule, and perhaps a ``regularizer``.
    """

    rank: Annotated[int, "Rank of each branch."] = 8
    average: Annotated[
        str,
        "Averaging rule: pema, pema-kron, pema-step, pema-literal, pema-released, dema, constant, none.",
    ] = "pema"
    c: Annotated[
        float,
        "Plasticity of pema and pema-kron: weight of a new task's Fisher information against that of earlier tasks.",
    ] = 5.0

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"c": (1e-9, 1e30)}
    """Of c up to where the average takes all of the new task and none of the earlier ones."""
    sides: ClassVar[tuple[str, ...]] = ("general", "expert")
    """The sides on which every modality of the suite has a branch."""
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"c": ("pema", "pema-kron")}
    """Hyperparameters of the averaging rule, and the rules that have each."""
    freeze: ClassVar[bool] = True
    """Whether a task trains only the branches whose modality it reads (general) or writes (expert); else all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in RULES:
            raise unknown("averaging rule", self.average, list(RULES))
        if not self.c > 0:
            raise UserError(f"expected c > 0, got c={self.c}")
        idle = self.idle({"average": self.average})
        for name in idle:
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise UserError(
                    f"{name}={value} has no effect with the averaging rule {self.average}, only with "
                    f"{' and '.join(self.options[name])}; omit it"
                )
        self.rule = RULES[self.average](**{name: getattr(self, name) for name in self.options if name not in idle})

    @classmethod
    def idle(cls, given: Mapping[str, Any]) -> Collection[str]:
        """Options of other averaging rules."""
        average = given.get("average", cls.average)
        return [name for name, rules in cls.options.items() if average not in rules]

    @property
    def roles(self) -> tuple[BranchRole, ...]:
        """The roles that have a branch."""
        return tuple(role for role in branch_roles(self.modalities) if role.side in self.sides)

    @property
    def general_branches(self) -> list[str]:
        """Names of the general branches."""
        return [role.name for role in self.roles if role.side == "general"]

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        return {role.name: self.rank for role in self.roles}

    def trained_branches(self, task: Task) -> Iterable[str]:
        trained = roles_of(task.reads, task.writes, self.modalities) if self.freeze else self.roles
        return [role.name for role in self.roles if role in trained]

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.groups = {name: adapters.branch_parameters(self.model, [name]) for name in self.trained_branches(task)}
        parameters = super().trainable(task)
        if isinstance(self.rule, PemaKron):
            others = adapters.branch_parameters(self.model)
            self.observed = self.rule.frozen = {n: p for n, p in others.items() if n not in parameters}
        return parameters

    def before_step(self, batch: Sequence[Any]) -> None:
        for parameter in self.observed.values():
            parameter.requires_grad_(isinstance(self.rule, PemaKron) and self.rule.reads)

    def after_task(self) -> dict[str, Any] | None:
        """Mean and standard deviation of beta, the weight of the old value, per branch, where the rule has one."""
        assert self.rule
        betas = self.rule.end_task()
        every = {name: parameter for group in self.groups.values() for name, parameter in group.items()}
        names = dict(zip(every, without_wrappers(every, "after_task"), strict=True))
        groups = {branch: {names[name]: p for name, p in group.items()} for branch, group in self.groups.items()}
        return {branch: pooled(betas, group) for branch, group in groups.items()} if betas else None


@dataclass
class TaskBranches(LowRank):
    """One branch per task: the current one is trained, those of earlier tasks are frozen, those of later tasks are off.

    The output is that of a model into whose W each earlier branch had been merged. ``active`` has the names of the
    branches in use, the current one last.
    """

    rank: Annotated[int, "Rank of each task's branch."] = 32

    by_task: ClassVar[bool] = True

    def branches(self, tasks: Sequence[Task]) -> dict[str, int]:
        return dict.fromkeys(self.branch_of.values(), self.rank)

    def trained_branches(self, task: Task) -> Iterable[str]:
        return self.active[-1:]

    def attach(self, tasks: Sequence[Task], generator: torch.Generator) -> None:
        self.branch_of = {task.name: f"task-{number}" for number, task in enumerate(tasks, 1)}
        super().attach(tasks, generator)
        self.activate(0)

    def activate(self, count: int) -> None:
        """Activates the branches of the first ``count`` tasks."""
        self.active = list(self.branch_of.values())[:count]
        adapters.activate(self.model, self.active)

    def trainable(self, task: Task) -> dict[str, nn.Parameter]:
        self.activate(list(self.branch_of).index(task.name) + 1)
        return super().trainable(task)

    def extra_bytes(self, tasks: int) -> int:
        """All branches but one, and the count of active ones."""
        one = adapters.branch_parameters(self.model, list(self.branch_of.values())[:1])
        everything = self.adapter_parameters()
        return 4 * sum(p.numel() for p in everything.values()) - 4 * sum(p.numel() for p in one.values()) + 8

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"active": torch.tensor(len(self.active))}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.activate(int(state["active"]))


def total_width(model: nn.Module, targets: Sequence[str] | str) -> int:
    """Sum of in_features + out_features over the linear layers of these targets: a rank's parameter count."""
    return sum(sum(sizes(layer)) for layer in linear_targets(model, targets).values())
