"""PEMA with Kronecker factors: the Fisher information of a row is an r x r block, in training and at a task's end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cnext import ops
from cnext.averaging.base import MovingAverage, Statistics, match_strides
from cnext.averaging.hyperparameters import LEAST, MOST, number
from cnext.averaging.task_parameters import require_supported
from cnext.distributed.wrapped_names import without_wrappers
from cnext.errors import UserError
from cnext.ops.kron import MOST_RANK

GROUPS = r"(?P<layer>.+?)(\.branches)?\.[^.]+\.(?P<side>[AB])|(?P<lora>.+\.lora_[AB])\.[^.]+(\.weight)?"
"""Default pattern of `PemaKron`: the branches of an `cnext.adapters.AdapterLinear` side by side, and PEFT's."""


@dataclass(frozen=True)
class Group:
    """Matrices side by side, (n, r) in all, whose Fisher information is diag(rows) (x) factor.

    names: of the parameters.  axes: the dimension of each that is its rank, see `cnext.ops.kron`.  n, r: sizes.
    diagonal: a parameter as (n, 1), flattened: its Fisher information is diagonal.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...]
    n: int
    r: int
    diagonal: bool = False


def groups_of(parameters: Mapping[str, Tensor], pattern: str = GROUPS) -> dict[str, Group]:
    """The groups of parameters by name.

    Names that match the pattern and agree in its named groups belong together. What fits in no block is a group of its
    own with a diagonal Fisher information: a vector, a matrix with both dimensions above `cnext.ops.kron.MOST_RANK`.
    Matrices with a larger rank in all are several groups.

    Args:
        parameters: or gradients, by name.
        pattern: a regular expression of the whole name, with named groups.

    Returns:
        Groups by name: the named groups of the match, joined by dots, or the parameter's own name.

    Raises:
        UserError: the pattern is no regular expression or names no group, or matrices of one group share no dimension.

    Example:
        >>> branches = {"q.text.A": torch.zeros(8, 32), "q.image.A": torch.zeros(4, 32), "q.text.B": torch.zeros(16, 8)}
        >>> [(name, group.names, group.n, group.r) for name, group in groups_of(branches).items()]
        [('q.A', ('q.image.A', 'q.text.A'), 32, 12), ('q.B', ('q.text.B',), 16, 8)]
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UserError(f"PemaKron: the pattern {pattern!r} is no regular expression: {error}") from error
    if not compiled.groupindex:
        raise UserError(
            f"PemaKron: the pattern {pattern!r} has no named group, as (?P<layer>.+); it would group nothing"
        )
    found: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        match = compiled.fullmatch(name) if parameter.ndim == 2 and min(parameter.shape) <= MOST_RANK else None
        key = ".".join(part for part in match.groupdict().values() if part) if match else name
        found.setdefault(key, []).append(name)
    groups: dict[str, Group] = {}
    for key, names in found.items():
        blocks = _blocks(sorted(names), parameters)  # in whatever order a task gives them
        groups |= {key if not i else f"{key}.{i}": group for i, group in enumerate(blocks)}
    return groups


def _blocks(names: Sequence[str], parameters: Mapping[str, Tensor]) -> list[Group]:
    """Consecutive parameters in groups of at most `MOST_RANK` columns."""
    first = parameters[names[0]]
    if first.ndim != 2 or min(first.shape) > MOST_RANK:
        return [Group(tuple(names), (1,), first.numel(), 1, diagonal=True)]
    axis = int(first.shape[1] <= first.shape[0])
    n, blocks, ranks = first.shape[1 - axis], [], []
    for name in names:
        rank, shared = parameters[name].shape[axis], parameters[name].shape[1 - axis]
        if shared != n:
            raise UserError(
                f"PemaKron: {names[0]!r} is {tuple(first.shape)} and {name!r} is {tuple(parameters[name].shape)}; the "
                f"matrices of a group share one dimension, here {n}; pass a pattern that keeps them apart"
            )
        if not blocks or sum(ranks) + rank > MOST_RANK:
            blocks.append([])
            ranks = []
        blocks[-1].append(name)
        ranks.append(rank)
    return [
        Group(tuple(block), (axis,) * len(block), n, sum(parameters[name].shape[axis] for name in block))
        for block in blocks
    ]


class _Call:
    """Groups of one device and dtype as the ops take them."""

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self.groups = list(groups)
        self.names = [name for group in groups.values() for name in group.names]
        self.diagonal = [group.diagonal for group in groups.values() for _ in group.names]
        self.parts = [len(group.names) for group in groups.values()]
        self.axes = [axis for group in groups.values() for axis in group.axes]

    def factors(self, *slots: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Lists over groups."""
        return [[slot[key] for key in self.groups] for slot in slots]

    def matrices(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """A list over matrices."""
        found = (tensors[name].detach() for name in self.names)
        return [
            t.as_strided((t.numel(), 1), (1, 1)) if diagonal else t
            for t, diagonal in zip(found, self.diagonal, strict=True)
        ]


def _require_one_kind(key: str, members: Sequence[tuple[str, Tensor]], diagonal: bool) -> None:
    """Raises UserError for parameters of a group that its ops would refuse in a task's second half."""
    first, like = members[0]
    for name, parameter in members:
        if not parameter.numel():
            raise UserError(f"begin_task: {name!r} has no elements; leave it out")
        if not diagonal and not parameter.is_contiguous():
            raise UserError(f"begin_task: {name!r} has strides {parameter.stride()}; expected a contiguous matrix")
        if (parameter.dtype, parameter.device) != (like.dtype, like.device):
            raise UserError(
                f"begin_task: {name!r} is {parameter.dtype} on {parameter.device}; expected {like.dtype} on "
                f"{like.device}, as {first!r} of the same group {key!r}"
            )


class PemaKron(MovingAverage):
    """PEMA whose Fisher information is a block per row, as a penalty during training and as a merge at a task's end.

    Matrices side by side are Theta, (n, r), with gradient G, see `groups_of`. The Fisher information of a task is
    F_t = diag(s) (x) R / tr R, with R the sum of G^T G and s the row sums of G^2 over the second half of its steps, in
    the unit in which F_t has mean 1 over all diagonal elements of the task, so that tasks whose losses differ in scale
    weigh the same. R is shrunk towards its diagonal. F_old is made of the sums of s and R over earlier tasks.

        every step:  Theta_i <- Theta_start_i + (Theta_i - Theta_start_i) (I + rate pull F_old,i)^-1
        task's end:  Theta_i <- Theta_i + (Theta_start_i - Theta_i) beta_i,  beta_i = M_i (M_i + F_t,i + damping I)^-1,
                     M = F_old / c

    for every row i, with blocks F_i = s_i R / tr R. The step is a proximal one, decoupled from the gradient as AdamW's
    weight decay is: the optimizer's scaling would pull least where the gradients, and F, are large. As that decay, it
    follows the learning rate: ``update(rate=...)`` takes the step's over the largest. A pull that stays where the
    learning rate falls undoes what the task has learnt.

    With r = 1, or a diagonal R, the merge is that of `Pema`. The first task is neither pulled nor merged. A row of G
    with a square that is not finite is skipped.

    Parameters: float32, bfloat16 or float16, contiguous. Memory: n + r^2 numbers of 4 bytes per group (s and R),
    and within a task as many again and a copy of the parameters (Theta_start).

    Args:
        pull: weight of a step's pull at the largest learning rate, at least 0. `update` changes the parameters, before
            the optimizer's step.
        c: plasticity of the merge, positive; larger keeps less of the old, infinity merges nothing.
        damping: positive, in units of F_t.
        shrinkage: weight, in [0, 1], of R's diagonal in R; 1 ignores its other elements.
        pattern: regular expression of parameter names whose named groups say what stands side by side, see `groups_of`.

    Raises:
        UserError: an argument is out of range. `begin_task`: matrices of a group do not fit together. `end_task`: at
            most half of the task's steps were seen, so that there is no F_t.

    Example:
        >>> import torch
        >>> from cnext.averaging import PemaKron
        >>> weight, average = torch.nn.Parameter(torch.zeros(1, 2)), PemaKron(pull=0.0, c=1.0, damping=1e-6)
        >>> for value in (2.0, 4.0):
        ...     with average.task({"weight": weight}, steps=1):
        ...         weight.grad = torch.ones(1, 2)
        ...         average.update()
        ...         weight.data[:] = value  # in place of an optimizer's step
        >>> weight.detach().round(decimals=3)
        tensor([[3., 3.]])

    Reference: the project's own; Continual-NExT, arXiv 2602.18055, section 4; Ritter et al., arXiv 1805.07810.
    """

    name = "pema-kron"
    kept = ("rows_old", "factor_old")

    def __init__(
        self,
        pull: float = 0.01,
        c: float = 5.0,
        damping: float = 0.01,
        shrinkage: float = 0.1,
        pattern: str = GROUPS,
    ) -> None:
        super().__init__()
        self.pull = number("PemaKron: pull", pull, 0, MOST)
        self.c = number("PemaKron: c", c, LEAST, math.inf)
        self.damping = number("PemaKron: damping", damping, LEAST, MOST)
        self.shrinkage = number("PemaKron: shrinkage", shrinkage, 0, 1)
        groups_of({}, pattern)
        self.pattern = pattern
        self.frozen: dict[str, nn.Parameter] = {}
        """Parameters beside the task's that do not move, by name: their gradients are read, where there are any."""
        self.groups: dict[str, Group] = {}
        self.rows_old: dict[str, Tensor] = {}
        self.factor_old: dict[str, Tensor] = {}
        self.rows_new: dict[str, Tensor] = {}
        self.factor_new: dict[str, Tensor] = {}
        self.theta_start: dict[str, Tensor] = {}
        self._past = False
        self._moved: dict[str, Group] = {}
        """The task's own matrices of each group."""
        self._reading: list[_Call] = []
        self._pulling: list[_Call] = []
        self._metric: dict[str, Tensor] = {}
        """R / tr R of earlier tasks, of the task's own matrices."""
        self._values: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        """Its eigenvalues and eigenvectors."""

    def slots(self) -> dict[str, dict[str, Tensor]]:
        names = ("rows_old", "factor_old", "rows_new", "factor_new", "theta_start")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.prepare()

    def kept_bytes(self, parameters: Mapping[str, Tensor]) -> int:
        return sum(4 * (group.n + group.r**2) for group in groups_of(parameters, self.pattern).values())

    def current(self, kind: str) -> Iterable[str]:
        return self.parameters if kind == "theta_start" else self.groups

    def past(self) -> dict[str, Tensor]:
        return self.rows_old

    def sizes_of_past(self) -> dict[str, torch.Size]:
        return {key: torch.Size([group.n]) for key, group in groups_of(self._every(), self.pattern).items()}

    def check_parameters(self) -> None:
        self.frozen = without_wrappers(self.frozen, "begin_task")
        every = self._every()
        require_supported(every)
        for key, group in groups_of(every, self.pattern).items():
            _require_one_kind(key, [(name, every[name]) for name in group.names], group.diagonal)

    def beside(self, trained: Mapping[str, Tensor], others: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Of other parameters those that stand beside a trained one in a group, and no trained one, for ``frozen``."""
        every = {**others, **trained}
        groups = [group.names for group in groups_of(every, self.pattern).values() if trained.keys() & {*group.names}]
        return {name: others[name] for names in groups for name in names if name not in trained}

    def _every(self) -> dict[str, nn.Parameter]:
        return {**self.parameters, **self.frozen}

    def start(self) -> None:
        every = self._every()
        self.groups = groups_of(every, self.pattern)
        self.theta_start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for key, group in self.groups.items():
            like = every[group.names[0]]
            for kind, shape in (("rows", (group.n,)), ("factor", (group.r, group.r))):
                new, old = self.slots()[f"{kind}_new"], self.slots()[f"{kind}_old"]
                new[key] = torch.zeros(shape, device=like.device)
                past = old.setdefault(key, torch.zeros_like(new[key]))
                if past.shape != shape:
                    raise UserError(
                        f"PemaKron: the group {key!r} has a {kind} of shape {shape}, and had {tuple(past.shape)} before"
                        "; a group has the same parameters in every task: pass those that do not move as `frozen`"
                    )
                old[key] = past.to(like.device)
        self.prepare()

    def prepare(self) -> None:
        """Derives what `update` needs from the past: where a task begins, and where its state is restored."""
        self._moved, self._metric, self._values, self._vectors = {}, {}, {}, {}
        self._past = any(bool(rows.any()) for rows in self.rows_old.values())
        for key, group in self.groups.items():
            own = [(name, axis) for name, axis in zip(group.names, group.axes, strict=True) if name in self.parameters]
            if own:
                self._moved[key] = replace(group, names=tuple(n for n, _ in own), axes=tuple(a for _, a in own))
                self._metric[key] = self._normalized(key, self.factor_old[key])
                # In float64 and on the CPU: the same on every device and process.
                values, vectors = torch.linalg.eigh(self._metric[key].double().cpu())
                self._values[key] = values.clamp(min=0).to(self._metric[key])
                self._vectors[key] = vectors.to(self._metric[key]).contiguous()
        self._reading, self._pulling = self._calls(self.groups), self._calls(self._moved)

    def _normalized(self, key: str, factor: Tensor) -> Tensor:
        """R / tr R, shrunk towards its diagonal, of the task's own matrices. factor: R of the whole group."""
        diagonal = factor.diagonal()
        whole = torch.lerp(factor, torch.diag(diagonal), self.shrinkage) / diagonal.sum().clamp(min=1e-30)
        own = torch.tensor([name in self.parameters for name in self.groups[key].names], device=factor.device)
        if bool(own.all()):
            return whole.contiguous()
        every = self._every()
        axes = self.groups[key].axes
        ranks = [every[name].shape[axis] for name, axis in zip(self.groups[key].names, axes, strict=True)]
        columns = own.repeat_interleave(torch.tensor(ranks, device=factor.device)).nonzero().flatten()
        return whole[columns[:, None], columns].contiguous()

    def _calls(self, groups: Mapping[str, Group]) -> list[_Call]:
        """The groups by device and dtype."""
        every = self._every()
        kinds: dict[tuple[torch.device, torch.dtype], dict[str, Group]] = {}
        for key, group in groups.items():
            first = every[group.names[0]]
            kinds.setdefault((first.device, first.dtype), {})[key] = group
        return [_Call(each) for each in kinds.values()]

    @property
    def reads(self) -> bool:
        """Whether the next `update` reads gradients, those of ``frozen`` included: in the second half of the steps."""
        return self.step >= self.steps // 2

    def read_gradients(self, losses: Tensor | None) -> None:
        if losses is not None:
            raise UserError("update: pema-kron reads the gradients of steps and takes no losses")
        if self.reads:
            every = self._every()
            for call in self._reading:
                gradients = {name: match_strides(every[name].grad, every[name]) for name in call.names}
                rows, factor = call.factors(self.rows_new, self.factor_new)
                ops.kron_accumulate_(rows, factor, call.matrices(gradients), call.parts, call.axes)
        weight = self.rate * self.pull
        for call in self._pulling if weight and self._past else ():
            theta, start = call.matrices(self.parameters), call.matrices(self.theta_start)
            rows, values, vectors = call.factors(self.rows_old, self._values, self._vectors)
            ops.kron_pull_(theta, start, rows, values, vectors, call.parts, call.axes, weight=weight)

    def require_steps(self) -> None:
        if self.step <= self.steps // 2:
            raise UserError(
                f"end_task after {self.step} of {self.steps} steps: the Fisher information comes from the second half; "
                "begin the task with the number of its steps, or call abort_task"
            )

    def finish(self) -> Statistics:
        # Their product is a weight of the merge, so a factor's trace must be in range too.
        sums = [tensor.sum() for new in (self.rows_new, self.factor_new) for tensor in new.values()]
        finite = bool(torch.stack([each.isfinite().cpu() for each in sums]).all())
        total = float(torch.stack([rows.double().sum().cpu() for rows in self.rows_new.values()]).sum())
        size = sum(group.n * group.r for group in self.groups.values())
        self.require_range(total if finite else math.inf, size)
        self.warn_of_zeros(total)
        scale = size / total if total > 0 else 0.0
        statistics = self._merged(scale) if self._past and self.c < math.inf else {}
        for new, old in ((self.rows_new, self.rows_old), (self.factor_new, self.factor_old)):
            for key, tensor in new.items():
                old[key].add_(tensor, alpha=scale)
        return statistics

    @torch.no_grad()
    def _merged(self, scale: float) -> Statistics:
        """Merges the parameters. Returns mean and standard deviation of each one's weight of the old, over its rows."""
        statistics: Statistics = {}
        for call in self._pulling:
            theta, start = call.matrices(self.parameters), call.matrices(self.theta_start)
            before = [tensor.clone() for tensor in theta]
            rows_new = [scale * self.rows_new[key] for key in call.groups]
            factor_new = [self._normalized(key, self.factor_new[key]) for key in call.groups]
            rows_old, factor_old = call.factors(self.rows_old, self._metric)
            lists = (theta, start, rows_new, factor_new, rows_old, factor_old)
            ops.kron_merge_(*lists, call.parts, call.axes, c=self.c, damping=self.damping)
            for name, axis, now, then, first in zip(call.names, call.axes, theta, before, start, strict=True):
                gap, moved = (first - then).float(), (now - then).float()
                beta = (gap * moved).sum(axis) / gap.square().sum(axis).clamp(min=1e-30)
                statistics[name] = beta.mean().item(), beta.std(correction=0).item()
        return {name: statistics[name] for name in self.parameters}

    def reset(self) -> None:
        self.rows_new, self.factor_new, self.theta_start = {}, {}, {}
        self.groups, self._moved, self._metric, self._values, self._vectors = {}, {}, {}, {}, {}
        self._reading, self._pulling = [], []
