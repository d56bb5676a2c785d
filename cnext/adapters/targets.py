"""The linear layers that adapters go into: found by name, and refused where an adapter could not compute them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from cnext.adapters.bases import has_plain_forward, is_linear, is_quantized, is_transposed, offloaded_to
from cnext.adapters.linear import AdapterLinear
from cnext.adapters.weight_reads import weight_readers
from cnext.errors import UserError, listed

ALL_LINEAR = "all-linear"
"""In place of names of targets: every linear layer but the output head."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read their linear layers' weights and may not call the layers."""
IN_FEATURES = {"in_features", "infeatures"}
"""An attribute that linear layers of quantization libraries have."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def linear_targets(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """The linear layers whose name ends in a target, by name. A layer that is at several places has its first name.

    Args:
        model: what to search.
        targets: last parts of names, one or several joined by dots; or "all-linear": all but the output head.

    Raises:
        UserError: targets that match no linear layer (all are named), layers that an adapter could not compute, experts
            that are no layers, or the model has adapters.
    """
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise UserError(f'targets must be a list of names, or "{ALL_LINEAR}"; got the text {targets!r}')
    if not targets:
        raise UserError(f'targets is empty; expected names of linear layers, or "{ALL_LINEAR}"')
    named = list(model.named_modules(remove_duplicate=False))
    adapted = [name for name, module in named if isinstance(module, AdapterLinear)]
    if adapted and (targets == ALL_LINEAR or any(_is_named(name, targets) for name in adapted)):
        raise UserError(f"the model has adapters already ({listed(adapted, 3)}); detach them first")
    if targets == ALL_LINEAR:
        chosen = _all_linear(model)
    else:
        _require_no_experts(model, targets)
        chosen = {name for name, _ in named if _is_named(name, targets)}
        _require_all_matched(named, targets)
    found: dict[nn.Module, str] = {}
    for name, module in named:
        if name in chosen and is_linear(module):
            found.setdefault(module, name)
    problems: dict[str, list[str]] = {}
    for name, module in named:
        if module in found and name not in chosen:
            problem = f"is the same module as {name}, which no target names; name both or neither"
            problems.setdefault(problem, []).append(found[module])
        if (name in chosen or targets == ALL_LINEAR) and not is_linear(module) and (vars(module).keys() & IN_FEATURES):
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
        others = "; name the other layers as targets" if targets == ALL_LINEAR else ""
        raise UserError(f"adapters cannot be attached: {told}{others}")
    return {name: module for module, name in found.items()}


def _is_named(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _all_linear(model: nn.Module) -> set[str]:
    """Names of all linear layers but output heads: those that a model gives as such, and those tied to embeddings."""
    if peft := [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.tuners")]:
        raise UserError(f"{listed(peft, 3)}: the model has adapters of PEFT; merge them or unload them first")
    getters = [getattr(one, "get_output_embeddings", None) for one in model.modules()]
    heads = [get() for get in getters if get is not None]
    embedded = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    found = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if is_linear(module) and module not in heads and id(module._parameters.get("weight")) not in embedded
    }
    if not found:
        raise UserError(f"{ALL_LINEAR}: the model has no linear layer but output heads")
    return found


def _experts(model: nn.Module) -> dict[str, str]:
    """Parameters with a matrix for each expert of a mixture, as of transformers 5: full name to own name."""
    return {
        f"{name}.{key}".lstrip("."): key.removesuffix("_blocks")
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 2 and len(parameter) > 1
        if "expert" in _class(module).lower() or key.endswith(("proj", "proj_blocks"))
    }


def _require_no_experts(model: nn.Module, targets: Sequence[str]) -> None:
    """Raises UserError for targets such as "up_proj", where experts have a matrix of that name and no layer."""

    def words(name: str) -> set[str]:
        return set(name.removesuffix("_proj").split("_"))  # of gate_up_proj: gate and up

    experts = _experts(model)
    asked = [target for target in targets if any(words(target) <= words(key) for key in experts.values())]
    if asked:
        left = [name for name, key in experts.items() if any(words(target) <= words(key) for target in asked)]
        raise UserError(
            f"{', '.join(asked)}: also of experts that are no linear layers, but parameters with a matrix for each "
            f"expert, which branches cannot be computed for: {listed(left, 3)}; leave these targets out, or name other "
            f'layers by more of their path ("shared_expert.{asked[-1]}"), and the experts stay without branches'
        )


def warn_of_experts(model: nn.Module, targets: Sequence[str] | str) -> None:
    """Warns of experts that "all-linear" leaves without branches, because they are no linear layers."""
    if targets == ALL_LINEAR and (experts := _experts(model)):
        warnings.warn(
            f'"{ALL_LINEAR}" leaves experts without branches: they are no linear layers, but parameters with a matrix '
            f"for each expert: {listed(list(experts), 3)}",
            stacklevel=3,
        )


def _require_all_matched(named: Sequence[tuple[str, nn.Module]], targets: Sequence[str]) -> None:
    unmatched = sorted(
        target for target in set(targets) if not any(is_linear(m) for name, m in named if _is_named(name, [target]))
    )
    if not unmatched:
        return
    there = sorted({name.rpartition(".")[2] for name, module in named if is_linear(module)})
    others = sorted({_library_class(module) for name, module in named if _is_named(name, unmatched)})
    kinds = f" (there is {', '.join(others)} of that name)" if others else ""
    raise UserError(
        f"no linear layer of the model is named {', '.join(unmatched)}{kinds}; its linear layers are named "
        f'{", ".join(there) or "nothing"}; give some of these as targets, or targets="{ALL_LINEAR}" for all of them '
        "but the output head"
    )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _library_class(module: nn.Module) -> str:
    """As "peft.Linear": other libraries' classes have torch's names."""
    return f"{type(module).__module__.partition('.')[0]}.{_class(module)}"


def _problem(layer: nn.Module, sizes_alone: bool) -> str | None:
    """Why an adapter could not compute a layer. sizes_alone: the whole model is on the meta device, to be counted."""
    if parametrize.is_parametrized(layer):
        return "has a parametrized weight; call torch.nn.utils.parametrize.remove_parametrizations first"
    if is_quantized(layer):
        return _forward_problem(layer)
    if not has_plain_forward(layer):
        return f"is a {_class(layer)}; adapters need the plain weight of a torch.nn.Linear"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight in a hook, as pruning and weight normalization do; make the weight permanent first"
    if is_lazy(weight):
        return "has no shape yet; run the model once first"
    if (problem := _forward_problem(layer)) is not None:
        return problem
    parts = [part for part in (weight, layer._parameters.get("bias")) if part is not None]
    for part in parts:
        if type(part) is not nn.Parameter or part.dtype not in DTYPES:
            return (
                f"holds {type(part.data).__name__} of {part.dtype}, as quantized or sharded layers do; expected plain "
                "tensors of float32, bfloat16, float16 or float64, or quantization by bitsandbytes or torchao: load "
                "the model without quantization"
            )
    expected = tuple(weight.shape) if is_transposed(layer) else (layer.out_features, layer.in_features)
    if weight.layout != torch.strided or weight.shape != expected:
        return f"has a weight of {weight.layout} and shape {tuple(weight.shape)}; expected a dense one of {expected}"
    if not sizes_alone and offloaded_to(layer) is None and any(part.is_meta for part in parts):
        return "is on the meta device, without values; load its weights first"
    return None


def _forward_problem(layer: nn.Module) -> str | None:
    """Why a layer's own forward may do more than the product.

    An adapter calls it where the weight is quantized or offloaded, and does not elsewhere.
    """
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", None) is None:
        return "has hooks of accelerate that do more than place its weight, which an adapter would not run; remove them"
    if hook is None and "forward" in vars(layer):
        return "has a forward of its own, set by another library; attach the adapters before"
    if any(getattr(layer, hooks) for hooks in HOOKS):
        return "has hooks, which an adapter would not run; attach the adapters first, and register them on its layer"
    return None
