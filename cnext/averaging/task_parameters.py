"""The parameters that a task of a moving average is given: their names, what cannot be averaged, and their past."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cnext.distributed.wrapped_names import without_wrappers
from cnext.errors import UserError, listed
from cnext.ops import checks

ONLY_TRAINED = "pass the module, or those of its parameters that require a gradient"


def named(parameters: nn.Module | Mapping[str, nn.Parameter], known: Collection[str]) -> dict[str, nn.Parameter]:
    """A task's parameters by name, without the prefixes of wrappers. known: names of earlier tasks' parameters.

    Raises:
        UserError: what came is neither a module nor a mapping, there is nothing to train, adapters are merged, or two
            names are one.
    """
    if isinstance(parameters, Mapping):
        found = without_wrappers(parameters, "begin_task", known)
        nothing = "the mapping of parameters is empty; expected those to train, by name"
    elif isinstance(parameters, nn.Module):
        # Frozen ones too say whether a first part of the names is a wrapper's.
        every = without_wrappers(dict(parameters.named_parameters()), "begin_task", known)
        found = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
        merged = [name for name, module in parameters.named_modules() if _is_merged(module)]
        if merged:
            raise UserError(
                f"begin_task: the adapters of {listed(merged, 3)} are merged into the weights, where they get no "
                "gradient; unmerge them first"
            )
        nothing = "no parameter of the module requires a gradient; unfreeze those to train"
    else:
        kind = type(parameters).__name__
        raise UserError(f"begin_task: parameters is a {kind}; expected a module, or a mapping of name to parameter")
    if not found:
        raise UserError(f"begin_task: {nothing}")
    return found


def _is_merged(module: nn.Module) -> bool:
    """Whether it is an adapter layer, of cnext or PEFT, that is merged though it is to be trained."""
    return getattr(module, "merged", None) is True and any(p.requires_grad for p in module.parameters())


def require_supported(parameters: Mapping[str, Tensor]) -> None:
    """Checks everything about the parameters that the ops will check.

    Raises:
        UserError: names the first parameter without values in memory, of another dtype or layout, or in another's
            memory.
    """
    for name, parameter in parameters.items():
        if (problem := _problem(parameter)) is not None:
            frozen = isinstance(parameter, Tensor) and not parameter.requires_grad
            raise UserError(f"begin_task: {name!r} {problem}{f'; {ONLY_TRAINED}' if frozen else ''}")
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters.items() if p.numel())
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise UserError(
                f"begin_task: {one!r} and {other!r} share memory, as tied weights do, and would be averaged twice; "
                "pass one of them"
            )


def _problem(parameter: Tensor) -> str | None:
    """Why a parameter cannot be averaged."""
    if not isinstance(parameter, Tensor):
        return f"is a {type(parameter).__name__}; expected a parameter"
    if is_lazy(parameter):
        return "has no shape yet; run the model once before the first task"
    try:
        checks.require_memory(type(parameter))
    except UserError as error:
        return f"cannot be averaged: {error}"
    if parameter.is_meta:
        return "is on the meta device, without values; load the weights first"
    if parameter.dtype not in checks.PARAM:
        return f"has dtype {parameter.dtype}; expected {', '.join(map(str, checks.PARAM))}"
    if not checks.dense(parameter):
        return f"has layout {parameter.layout} or gaps; expected a dense tensor, see contiguous()"
    return None


def require_past(own: Mapping[str, torch.Size], past: Mapping[str, torch.Size]) -> None:
    """Checks that a task's names are those of earlier tasks: a parameter under another name has lost its past.

    Args:
        own: shapes of what the task has a past of, by name.
        past: shapes of what is kept of earlier tasks.

    Raises:
        UserError: none has a past, and the names differ by a prefix.

    Warns:
        RuntimeWarning: none has a past, the names of some differ by a prefix, or some have no past while others of
            their shapes, which have one, are not in the task.
    """
    renamed, known = _renamed(own, past), own.keys() & past
    shapes = {past[name] for name in past.keys() - own}
    alike = [name for name in own if name not in past and own[name] in shapes]
    if not past or (known and not renamed and not alike):
        return
    if renamed:
        pairs = listed((f"{new!r}, earlier {old!r}" for new, old in renamed.items()), 3)
        told = f"these names differ from earlier ones by a prefix, and would lose their past: {pairs}"
    elif known:
        ones, others = (listed(map(repr, names), 3) for names in (alike, [name for name in past if name not in own]))
        told = f"no past is known of {ones}; these have one, and are of the same shapes, but not in the task: {others}"
    else:
        ones, others = (listed(map(repr, names), 3) for names in (own, past))
        told = f"this is as a first task: no past is known of {ones}, only of {others}"
    advice = "a name is the same in every task; if no earlier task trained these parameters, pass untrained=True"
    if renamed and not known:
        raise UserError(f"begin_task: {told}; {advice}")
    warnings.warn(f"begin_task: {told}; {advice}", RuntimeWarning, stacklevel=4)


def _renamed(own: Mapping[str, torch.Size], past: Mapping[str, torch.Size]) -> dict[str, str]:
    """New names to earlier ones of the same shape, where one is the other with a prefix."""
    lost, new = past.keys() - own, own.keys() - past
    longer = {end: name for name in lost for end in _ends(name)}
    found = {name: [longer.get(name), *(end for end in _ends(name) if end in lost)] for name in own if name in new}
    return {name: old for name, all_ in found.items() for old in all_ if old is not None and past[old] == own[name]}


def _ends(name: str) -> list[str]:
    """What is left of a name without its first part, its first two parts, and so on."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]
