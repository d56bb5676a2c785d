"""Putting adapters into a model and taking them out again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnext.adapters.linear import AdapterLinear, Branch
from cnext.adapters.shared_input import join, part
from cnext.errors import UserError, unknown

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one module that read the same x in most decoders of transformers."""


def check_ranges(ranks: Mapping[str, int], scale: float, dropout: float) -> None:
    """Raises UserError for a rank below 1, a scale that is not finite, or a dropout outside [0, 1)."""
    for branch, rank in ranks.items():
        if rank < 1:
            raise UserError(f"the rank of branch {branch} must be at least 1, got {rank}")
    if not math.isfinite(scale):
        raise UserError(f"scale must be finite, got {scale}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")


def trained_like(drawn: Tensor, weight: Tensor) -> Tensor:
    """First values of a parameter beside a frozen weight: on its device, in its dtype, but in float32 at least.

    In bfloat16 the steps of a small learning rate would be lost.
    """
    return drawn.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def attach(
    model: nn.Module,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    independent: bool = False,
    shared: Sequence[Sequence[str]] = SHARED,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replaces every linear layer whose name ends in a target by an AdapterLinear; freezes all the rest.

    A is drawn as PEFT draws it, uniform in +-1/sqrt(in_features), in one draw per layer over all branches: methods
    that divide the same total rank differently, or add to it, start from the same numbers. B starts at zero.

    Args:
        ranks: branch name to rank.
        scale, dropout, independent: see `AdapterLinear`.
        shared: names of sibling layers that may be computed together: they are where their parent's forward calls them
            on the same variable, see `joined`. () computes each alone.
        generator: source of the draws, on the CPU.

    Returns:
        The model, changed in place.

    Raises:
        UserError: a rank below 1, a dropout outside [0, 1), targets that matched no linear layer (all are named), or a
            layer whose weight is not plain.
    """
    check_ranges(ranks, scale, dropout)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, nn.Linear)
    ]
    if unmatched := sorted(set(targets) - {name.rpartition(".")[2] for name, _ in found}):
        there = sorted({n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)})
        raise UserError(
            f"no linear layer of the model is named {', '.join(unmatched)}; its linear layers are named "
            f"{', '.join(there) or 'nothing'}"
        )
    for name, module in found:
        if type(module).forward is not nn.Linear.forward:
            raise UserError(f"{name} is a {type(module).__name__}; adapters need the plain weight of a torch.nn.Linear")
    model.requires_grad_(False)
    for name, module in found:
        # A generator of its own for every layer: the first rows are the same however many a method has.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        bound = module.in_features**-0.5
        drawn = torch.empty(sum(ranks.values()), module.in_features).uniform_(-bound, bound, generator=own)
        parts = trained_like(drawn, module.weight).split(list(ranks.values()))
        branches = {key: Branch(part, module.out_features) for key, part in zip(ranks, parts, strict=True)}
        parent, _, child = name.rpartition(".")
        layer = AdapterLinear(module, branches, scale, dropout, independent).train(module.training)
        setattr(model.get_submodule(parent), child, layer)
    for parent in {name.rpartition(".")[0]: None for name, _ in found}:
        join(model.get_submodule(parent), shared)
    return model


def layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The model's adapter layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters out: every AdapterLinear gives way to its base layer, unmerged where it was merged."""
    for name, layer in layers(model).items():
        if layer.merged:
            layer.unmerge()
        name, _, child = name.rpartition(".")
        parent = model.get_submodule(name)
        setattr(parent, child, layer.base)
        part(parent)
    return model


def _named(model: nn.Module, branches: Iterable[str]) -> tuple[str, ...]:
    """The names, each once. Raises UserError for those that no layer of the model has a branch of."""
    there = list(dict.fromkeys(name for layer in layers(model).values() for name in layer.branches))
    valid = there or ["none: the model has no adapter layers"]
    if isinstance(branches, str):
        raise UserError(f"branches must be a list of names, got the text {branches!r}; valid: {', '.join(valid)}")
    asked = tuple(dict.fromkeys(branches))
    if strange := [str(name) for name in asked if name not in there]:
        raise unknown("branch", ", ".join(strange), valid)
    return asked


def branch_parameters(model: nn.Module, branches: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the named branches (default: all), keyed "<layer>.<branch>.<A or B>".

    Raises: UserError for a branch that no layer has, as do `activate`, `activated` and `set_trainable`.
    """
    wanted = None if branches is None else _named(model, branches)
    return {
        f"{name}.{key}.{part}": parameter
        for name, layer in layers(model).items()
        for key, branch in layer.branches.items()
        if wanted is None or key in wanted
        for part, parameter in branch.named_parameters()
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the adapter layers but their base's: branches, and routers, keyed "<layer>.router.<name>"."""
    return {
        f"{name}.{key}": parameter
        for name, layer in layers(model).items()
        for key, parameter in layer.adapter_parameters()
    }


def activate(model: nn.Module, branches: Iterable[str]) -> None:
    """Lets exactly these branches take part in every layer that has them; none: as it was without adapters."""
    asked = _named(model, branches)
    for layer in layers(model).values():
        layer.active = tuple(name for name in asked if name in layer.branches)


@contextmanager
def activated(model: nn.Module, branches: Iterable[str]) -> Iterator[None]:
    """Inside, exactly these branches take part; () switches the adapters off."""
    before = {name: layer.active for name, layer in layers(model).items()}
    activate(model, branches)
    try:
        yield
    finally:
        for name, layer in layers(model).items():
            layer.active = before[name]


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold these values; afterwards their own again, to the bit."""
    own = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)


def set_trainable(model: nn.Module, branches: Iterable[str]) -> dict[str, nn.Parameter]:
    """Unfreezes the named branches, freezes everything else, and returns the parameters to optimize.

    Only these belong into an optimizer: a frozen branch then has no gradient, no optimizer state and no weight decay.
    """
    chosen = branch_parameters(model, branches)
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    return chosen
