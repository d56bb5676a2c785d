"""Putting adapters into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from cnext.adapters.linear import AdapterLinear, Branch


def attach(
    model: nn.Module,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replaces every linear layer whose name ends in a target by an AdapterLinear; freezes all the rest.

    A is drawn as PEFT draws it, uniform in +-1/sqrt(in_features), in one draw per layer over all branches: methods
    that divide the same total rank differently start from the same numbers. B starts at zero.

    Args: ranks: branch name to rank.  generator: source of the draws, on the CPU.
    Returns: the model, changed in place.
    Raises: ValueError naming every target that matched no linear layer.
    """
    model.requires_grad_(False)
    unmatched = set(targets)
    for name, module in list(model.named_modules()):
        target = name.rpartition(".")[2]
        if target not in targets or not isinstance(module, nn.Linear):
            continue
        unmatched.discard(target)
        bound = module.in_features**-0.5
        drawn = torch.empty(sum(ranks.values()), module.in_features).uniform_(-bound, bound, generator=generator)
        parts = drawn.to(module.weight).split(list(ranks.values()))
        branches = {key: Branch(part.clone(), module.out_features) for key, part in zip(ranks, parts, strict=True)}
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, target, AdapterLinear(module, branches, scale, dropout))
    if unmatched:
        raise ValueError(f"no linear layer of the model is named {', '.join(sorted(unmatched))}")
    return model


def layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The model's adapter layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters out: every AdapterLinear gives way to its untouched base layer."""
    for name, layer in layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def branch_parameters(model: nn.Module, branches: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the named branches (default: all), keyed "<layer>.<branch>.<A or B>"."""
    wanted = None if branches is None else set(branches)
    return {
        f"{name}.{key}.{part}": parameter
        for name, layer in layers(model).items()
        for key, branch in layer.branches.items()
        if wanted is None or key in wanted
        for part, parameter in branch.named_parameters()
    }


def set_trainable(model: nn.Module, branches: Iterable[str]) -> dict[str, nn.Parameter]:
    """Unfreezes the named branches, freezes everything else, and returns the parameters to optimize.

    Only these belong into an optimizer: a frozen branch then has no gradient, no optimizer state and no weight decay.
    """
    model.requires_grad_(False)
    chosen = branch_parameters(model, branches)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    return chosen
