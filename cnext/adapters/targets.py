"""The linear layers that adapters go into: found by name, and refused where an adapter could not compute them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from cnext.adapters.linear import AdapterLinear
from cnext.adapters.weight_reads import weight_readers
from cnext.errors import UserError, listed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read their linear layers' weights and may not call the layers."""
IN_FEATURES = {"in_features", "infeatures"}
"""An attribute that linear layers of quantization libraries have."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose name ends in a target, by name. A layer that is at several places has its first name.

    Raises:
        UserError: targets that match no linear layer (all are named), or layers that an adapter could not compute.
    """
    named = [(name, name.rpartition(".")[2], module) for name, module in model.named_modules(remove_duplicate=False)]
    found: dict[nn.Linear, str] = {}
    for name, last, module in named:
        if last in targets and isinstance(module, nn.Linear):
            found.setdefault(module, name)
    _require_all_matched(named, set(targets), found)
    problems: dict[str, list[str]] = {}
    for name, last, module in named:
        if isinstance(module, nn.Linear) and module in found and last not in targets:
            problem = f"is the same module as {name}, which no target names; name both or neither"
            problems.setdefault(problem, []).append(found[module])
        if last in targets and not isinstance(module, nn.Linear) and (vars(module).keys() & IN_FEATURES):
            problems.setdefault(f"is a {_library_class(module)}; adapters need a torch.nn.Linear", []).append(name)
    readers = weight_readers(model)
    readers |= {child: one for one in model.modules() if isinstance(one, READS_WEIGHTS) for child in one.children()}
    sizes_alone = all(parameter.is_meta for parameter in model.parameters())
    for module, name in found.items():
        problem = _problem(module, sizes_alone)
        if problem is None and module in readers:
            problem = f"is part of a {_class(readers[module])}, which reads its weight without calling it"
        if problem is not None:
            problems.setdefault(problem, []).append(name)
    if problems:
        told = "; ".join(f"{listed(names, 3)} {problem}" for problem, names in problems.items())
        raise UserError(f"adapters cannot be attached: {told}")
    return {name: module for module, name in found.items()}


def _require_all_matched(
    named: Iterable[tuple[str, str, nn.Module]], targets: set[str], found: Mapping[nn.Linear, str]
) -> None:
    modules = [module for _, _, module in named]
    if not found and any(isinstance(module, AdapterLinear) for module in modules):
        raise UserError("the model has adapters already; detach them first")
    there = {last for _, last, module in named if isinstance(module, nn.Linear)}
    others = sorted({_library_class(m) for _, last, m in named if last in targets - there})
    if unmatched := sorted(targets - there):
        kinds = f" (there is {', '.join(others)} of that name)" if others else ""
        raise UserError(
            f"no linear layer of the model is named {', '.join(unmatched)}{kinds}; its linear layers are named "
            f"{', '.join(sorted(there)) or 'nothing'}"
        )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _library_class(module: nn.Module) -> str:
    """As "peft.Linear": other libraries' classes have torch's names."""
    return f"{type(module).__module__.partition('.')[0]}.{_class(module)}"


def _problem(layer: nn.Linear, sizes_alone: bool) -> str | None:
    """Why an adapter could not compute a layer. sizes_alone: the whole model is on the meta device, to be counted."""
    if parametrize.is_parametrized(layer):
        return "has a parametrized weight; call torch.nn.utils.parametrize.remove_parametrizations first"
    if type(layer).forward is not nn.Linear.forward:
        return f"is a {_class(layer)}; adapters need the plain weight of a torch.nn.Linear"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight in a hook, as pruning and weight normalization do; make the weight permanent first"
    if is_lazy(weight):
        return "has no shape yet; run the model once first"
    if (problem := _forward_problem(layer)) is not None:
        return problem
    for part in (weight, layer.bias):
        if part is not None and (type(part) is not nn.Parameter or part.dtype not in DTYPES):
            return (
                f"holds {type(part.data).__name__} of {part.dtype}, as quantized or sharded layers do; expected plain "
                "tensors of float32, bfloat16, float16 or float64: load the model without quantization"
            )
    if weight.layout != torch.strided or weight.shape != (layer.out_features, layer.in_features):
        expected = (layer.out_features, layer.in_features)
        return f"has a weight of {weight.layout} and shape {tuple(weight.shape)}; expected a dense one of {expected}"
    if not sizes_alone and any(part is not None and part.is_meta for part in (weight, layer.bias)):
        return "is on the meta device, without values; load its weights first"
    return None


def _forward_problem(layer: nn.Linear) -> str | None:
    """Why a layer's own forward, which an adapter does not call, may do more than the product."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", True):
        return (
            "is offloaded by accelerate, which loads its weight at each call; load the model on devices that hold it "
            "whole, without offloading"
        )
    if hook is None and "forward" in vars(layer):
        return "has a forward of its own, set by another library; attach the adapters before"
    if any(getattr(layer, hooks) for hooks in HOOKS):
        return "has hooks, which an adapter would not run; attach the adapters first, and register them on its layer"
    return None
