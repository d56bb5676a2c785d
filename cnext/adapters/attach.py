"""Attach adapters to a model, select and train branches, and detach them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnext.adapters.bases import offloaded_to, sizes
from cnext.adapters.linear import AdapterLinear, Branch
from cnext.adapters.shared_input import join, part
from cnext.adapters.targets import linear_targets, warn_of_experts
from cnext.errors import UserError, listed, unknown

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling linear layers that read the same x in most decoders of transformers."""
MATRIX_A = ("fixed", "trained")
"""What can be done with matrix A of a branch: fix it at its random initial value, or train it."""


def check_ranges(ranks: Mapping[str, int], scale: float, dropout: float) -> None:
    """Raises UserError for a rank below 1, a scale that is not finite, or a dropout outside [0, 1)."""
    for branch, rank in ranks.items():
        if rank < 1:
            raise UserError(f"the rank of branch {branch} must be at least 1, got {rank}")
    if not math.isfinite(scale):
        raise UserError(f"scale must be finite, got {scale}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")


def trained_like(values: Tensor, weight: Tensor, device: torch.device | None = None) -> Tensor:
    """Initial values of a parameter beside a frozen weight: on its device, in its dtype but at least float32.

    In bfloat16 the steps of a small learning rate would round to nothing.
    """
    return values.to(device or weight.device, torch.promote_types(weight.dtype, torch.float32))


def attach(
    model: nn.Module,
    targets: Sequence[str] | str,
    ranks: Mapping[str, int],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    independent: bool = False,
    init_std: float = 0.0,
    shared: Sequence[Sequence[str]] = SHARED,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replaces every linear layer whose name ends in a target by an `AdapterLinear`, and freezes all other parameters.

    A layer that is at several places of the model stays one layer: all of them get the same `AdapterLinear`.

    A is initialized as in PEFT, uniform in +-1/sqrt(in_features), and B with zeros. All branches of a layer are sampled
    in one draw: methods that divide the same total rank differently, or add to it, start from the same values.

    A linear layer is a torch.nn.Linear, also one that torchao or bitsandbytes has quantized (to 4 or 8 bits), or a
    Conv1D of transformers. Beside a quantized weight A and B are float32, and computed in the dtype of x, as in PEFT's
    QLoRA.

    Args:
        model: changed in place.
        targets: last parts of the names of linear layers ("q_proj", or "mlp.shared_expert.up_proj" to leave out others
            of the name "up_proj"); or "all-linear": every linear layer but the output head, as in PEFT.
        ranks: branch name to rank.
        scale, dropout, independent: see `AdapterLinear`.
        init_std: standard deviation of A's initial values, which then are normal, as released with 0.01. 0: uniform.
        shared: groups of sibling layers that may be computed together. They are where their parent's forward calls them
            on the same variable, see `joined`. () computes each by itself.
        generator: source of initial values, on the CPU. Default: torch's own.

    Returns:
        The model.

    Raises:
        UserError: a rank below 1, a dropout outside [0, 1), targets that match no linear layer (all are named), or a
            layer that an adapter could not compute: its weight is sharded, parametrized, quantized by another library
            or on the meta device, it has hooks, or another name of it is no target; the model has adapters already; or
            a target names experts of a mixture that are no linear layers. The model is then unchanged. (A model that
            is on the meta device as a whole can have adapters, to be counted.)

    Warns:
        UserWarning: "all-linear", and the model has such experts, which stay without branches.

    Example:
        >>> attach(model, ("q_proj", "v_proj"), {"lora": 16}, scale=2.0)
        >>> optimizer = torch.optim.AdamW(set_trainable(model, ["lora"]).values(), 1e-4)
    """
    check_ranges(ranks, scale, dropout)
    found = linear_targets(model, targets)
    warn_of_experts(model, targets)
    model.requires_grad_(False)
    made: dict[nn.Module, nn.Module] = {}
    for module in found.values():
        # A generator per layer: the first rows are the same for every total rank.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        width, out = sizes(module)
        values = torch.empty(sum(ranks.values()), width)
        if init_std:
            values.normal_(std=init_std, generator=own)
        else:
            values.uniform_(-(width**-0.5), width**-0.5, generator=own)
        weight = module.get_parameter("weight")
        parts = trained_like(values, weight, offloaded_to(module)).split(list(ranks.values()))
        branches = {key: Branch(part, out) for key, part in zip(ranks, parts, strict=True)}
        made[module] = AdapterLinear(module, branches, scale, dropout, independent).train(module.training)
    for parent in replace_modules(model, made):
        join(parent, shared)
    return model


def replace_modules(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> list[nn.Module]:
    """Replaces modules by others wherever the model has them: one module may be at several places.

    Returns:
        The modules whose children have changed.
    """
    changed = []
    for parent in list(model.modules()):
        found = {
            name: others[child] for name, child in parent._modules.items() if child is not None and child in others
        }
        for name, other in found.items():
            setattr(parent, name, other)
        changed += [parent] if found else []
    return changed


def layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The model's adapter layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


def detach(model: nn.Module) -> nn.Module:
    """Replaces every `AdapterLinear` by its base layer, unmerged, and returns the model, changed in place.

    Whether parameters require a gradient stays as it is; see `AttachedMage.detach`.
    """
    found = layers(model).values()
    for layer in found:
        if layer.merged:
            layer.unmerge()
    for parent in replace_modules(model, {layer: layer.base for layer in found}):
        part(parent)
    return model


def _named(model: nn.Module, branches: Iterable[str]) -> tuple[str, ...]:
    """The names without repetition. Raises UserError for those that no layer of the model has a branch of."""
    found = list(dict.fromkeys(name for layer in layers(model).values() for name in layer.branches))
    valid = found or ["none: the model has no adapter layers"]
    if isinstance(branches, str):
        raise UserError(f"branches must be a list of names, got the text {branches!r}; valid: {', '.join(valid)}")
    asked = tuple(dict.fromkeys(branches))
    if missing := [str(name) for name in asked if name not in found]:
        raise unknown("branch", ", ".join(missing), valid)
    return asked


def branch_parameters(model: nn.Module, branches: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the named branches (default: all), keyed "<layer>.<branch>.<A or B>".

    Raises:
        UserError: a branch that no layer has.
    """
    chosen = None if branches is None else _named(model, branches)
    return {
        f"{name}.{key}.{part}": parameter
        for name, layer in layers(model).items()
        for key, branch in layer.branches.items()
        if chosen is None or key in chosen
        for part, parameter in branch.named_parameters()
    }


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the adapter layers but their base's: `branch_parameters`, and "<layer>.router.<name>"."""
    return {
        f"{name}.{key}": parameter
        for name, layer in layers(model).items()
        for key, parameter in layer.adapter_parameters()
    }


def activate(model: nn.Module, branches: Iterable[str]) -> None:
    """Makes exactly these branches active, in every layer that has them; [] disables the adapters.

    Raises:
        UserError: a branch that no layer has, or another choice than what is merged.
    """
    asked = _named(model, branches)
    chosen = {layer: tuple(name for name in asked if name in layer.branches) for layer in layers(model).values()}
    require_unmerged(model, (layer for layer, names in chosen.items() if names != tuple(layer.active)), "activate")
    for layer, names in chosen.items():
        layer.active = names


def require_unmerged(model: nn.Module, chosen: Iterable[AdapterLinear], what: str) -> None:
    """Raises UserError where any of the layers is merged, and the branches themselves are not computed."""
    names = {layer: name for name, layer in layers(model).items()}
    if found := [names[layer] for layer in chosen if layer.merged]:
        raise UserError(
            f"{what}: the branches are merged into the weights of {listed(found, 3)}, where they always act and cannot "
            "be trained; call unmerge first"
        )


@contextmanager
def activated(model: nn.Module, branches: Iterable[str]) -> Iterator[None]:
    """Context in which exactly these branches are active; [] disables the adapters. Raises as `activate`.

    Example:
        >>> with activated(model, []):
        ...     pretrained = model(**inputs)
    """
    before = {name: layer.active for name, layer in layers(model).items()}
    activate(model, branches)
    try:
        yield
    finally:
        for name, layer in layers(model).items():
            layer.active = before[name]


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which parameters have these values; their own are restored afterwards, bit for bit.

    Args:
        parameters: by name.
        values: of some of them, of the same shapes.
    """
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
    """Unfreezes the named branches and freezes all other parameters of the model.

    Returns:
        The parameters to optimize, as `branch_parameters`. Give only these to an optimizer: a frozen branch then has
        no gradient, no optimizer state and no weight decay.

    Raises:
        UserError: a branch that no layer has, or the branches are merged.
    """
    chosen = branch_parameters(model, branches)
    require_unmerged(model, layers(model).values(), "set_trainable")
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    return chosen


def only_b(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The B matrices of branches' parameters by name."""
    return {name: parameter for name, parameter in parameters.items() if name.endswith(".B")}


def fix_a(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Freezes A of branches' parameters by name, and returns B, which is left to optimize."""
    chosen = only_b(parameters)
    for name in parameters.keys() - chosen.keys():
        parameters[name].requires_grad_(False)
    return chosen
