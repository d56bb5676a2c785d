"""Converts branches to and from the layout of the adapter files that the paper's authors released.

A file maps names to tensors: branches under ``...lora_A.default.loraA.<branch>.weight`` or, the same tensor again,
``....mlp.weight``; routers, which files of mage contain and mage does not use; and what else was trained.

Reference: Continual-NExT, arXiv 2602.18055, the released code of SEED-X with MAGE, MoELoRA and LoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cnext.adapters.attach import layers
from cnext.adapters.exchange import Branches, branches_of, not_finite, overflows, require_finite
from cnext.adapters.roles import BRANCH_ROLES
from cnext.errors import UserError, listed, unknown

KINDS = ("mage", "moelora", "lora")
ROLES = tuple(role.name for role in BRANCH_ROLES)
LLM = "llm.base_model.model."
BRANCH = re.compile(
    r"(?P<layer>.+)\.lora_(?P<half>[AB])\.default\.(lora(?P=half)\.(?P<expert>0|[1-9][0-9]{0,4})\.(mlp\.)?)?weight"
)
ROUTER = re.compile(r"(?P<layer>.+)\.lora_router\.default\.weight")
NORM = re.compile(r"(?P<norm>.+)\.modules_to_save\.default\.weight")
IGNORED = {"original_module": re.compile(r".+\.original_module\.weight"), "inv_freq": re.compile(r".+\.inv_freq")}
IN_LLM = {"embeddings": re.compile(r".*embed_tokens\.weight"), "head": re.compile(r"lm_head\.weight")}
BESIDE = ("input_resampler", "output_resampler", "patch_pos_embed")
LANGUAGE_MODEL = (*IN_LLM, "norms")
"""Kinds of extra tensors that are parameters of the language model, and named as there."""


@dataclass(frozen=True)
class Released:
    """Contents of a released file. Layers and the language model's parameters are named as in the transformers model.

    routers: layer to (experts, in_features); of moelora alone.
    extras: kind to name to tensor. Kinds: "embeddings", "head" and "norms" of the language model; those of a backbone,
        of SEED-X "input_resampler", "output_resampler" and "patch_pos_embed", with names as in the file.
    ignored: kind to number of tensors that were skipped.
    """

    branches: Branches
    routers: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)


def from_released(
    state: Mapping[str, Tensor], kind: str, scale: float = 1.0, beside: Collection[str] | None = BESIDE
) -> Released:
    """Parses the tensors of a released file.

    Args:
        state: name to tensor.
        kind: "mage", "moelora" or "lora". Files of mage and moelora look alike and differ in the use of routers only.
        scale: alpha / total rank, which files do not contain; 32 / 32 in all released ones.
        beside: first parts of the names of tensors that are not the language model's. None: all but "llm".

    Raises:
        UserError: unknown keys, missing branches, wrong shapes, or a file of another kind; all are named.
    """
    if kind not in KINDS:
        raise unknown("kind of released adapter", kind, KINDS)
    if strange := not_finite(state):
        raise UserError(f"not a released {kind} adapter as expected: not finite numbers: {listed(strange)}")
    halves: dict[str, dict[str, dict[str, Tensor]]] = {}
    routers, extras, ignored, problems = {}, {}, Counter(), {}

    def problem(what: str, name: str) -> None:
        problems.setdefault(what, []).append(name)

    for key, tensor in state.items():
        name = key.removeprefix("module.")
        part = name.partition(".")[0]
        inner = name.removeprefix(LLM)
        if part != "llm" if beside is None else part in beside:
            extras.setdefault(part, {})[name] = tensor
        elif not name.startswith("llm."):
            problem("unknown keys", key)
        elif found := next((what for what, pattern in IGNORED.items() if pattern.fullmatch(inner)), None):
            ignored[found] += 1
        elif match := BRANCH.fullmatch(inner):
            pair = halves.setdefault(match["layer"], {}).setdefault(match["expert"] or "lora", {})
            if not torch.equal(pair.setdefault(match["half"], tensor), tensor):
                problem("two spellings of a tensor that differ", key)
        elif match := ROUTER.fullmatch(inner):
            routers[match["layer"]] = tensor
        elif match := NORM.fullmatch(inner):
            extras.setdefault("norms", {})[f"{match['norm']}.weight"] = tensor
        elif found := next((what for what, pattern in IN_LLM.items() if pattern.fullmatch(inner)), None):
            extras.setdefault(found, {})[inner] = tensor
        else:
            problem("unknown keys", key)
    if kind != "moelora":
        ignored.update({"lora_router": len(routers)} if routers else {})
        routers = {}
    names, ranks, pairs = _names(halves, kind), {}, {}
    for layer, experts in halves.items():
        pairs[layer] = {}
        for number, branch in names.items():
            pair = experts.get(number, {})
            if pair.keys() != {"A", "B"}:
                problem("branches missing", f"{layer}.{number} ({' and '.join({'A', 'B'} - pair.keys())})")
            elif any(t.ndim != 2 or not t.numel() for t in pair.values()) or len(pair["A"]) != pair["B"].shape[1]:
                shapes = ", ".join(f"{half} {tuple(pair[half].shape)}" for half in "AB")
                problem("wrong shapes", f"{layer}.{number}: {shapes}, expected (rank, in) and (out, rank)")
            else:
                pairs[layer][branch] = (pair["A"], pair["B"])
                if (rank := len(pair["A"])) != ranks.setdefault(branch, rank):
                    problem("other ranks", f"{layer}.{number}: {rank}, expected {ranks[branch]} as in the first layer")
        if extra := experts.keys() - names.keys():
            problem("branches too many", f"{layer} has {', '.join(sorted(extra))}, expected {', '.join(names)}")
        if kind == "moelora" and not problems:
            width = next(iter(pairs[layer].values()))[0].shape[1]
            if layer not in routers:
                problem("routers missing", layer)
            elif routers[layer].shape != (len(names), width):
                shape = tuple(routers[layer].shape)
                problem("wrong shapes", f"router of {layer} {shape}, expected {len(names), width}")
    if problems:
        raise UserError(
            f"not a released {kind} adapter as expected: "
            + "; ".join(f"{what}: {listed(found)}" for what, found in problems.items())
        )
    return Released(Branches(pairs, scale), routers, extras, dict(ignored))


def _names(halves: dict[str, dict[str, dict[str, Tensor]]], kind: str) -> dict[str, str]:
    """Branches in the file to their names in cnext. Raises UserError where the file is of another kind."""
    if not halves:
        raise UserError(
            f"expected a released adapter, with tensors {LLM}<layer>.lora_A.default...weight, found none; is it of "
            "other weights, or of a PEFT adapter without its adapter_config.json?"
        )
    found = {number for experts in halves.values() for number in experts}
    if kind == "mage" and "lora" not in found:
        return {str(number): role for number, role in enumerate(ROLES)}
    if kind == "moelora" and "lora" not in found:
        if lost := {str(number) for number in range(len(found))} - found:
            raise UserError(
                f"expected experts numbered from 0 without gaps, the file has {len(found)} and none of the numbers "
                f"{listed(sorted(lost, key=int))}"
            )
        return {str(number): f"expert-{number}" for number in range(len(found))}
    if kind == "lora" and found == {"lora"}:
        return {"lora": "lora"}
    contents = "one plain branch: kind lora" if found == {"lora"} else "numbered branches: kind mage or moelora"
    raise UserError(f"expected a released adapter of kind {kind}, the file has {contents}")


def kind_of(model: nn.Module) -> str:
    """Which of `KINDS` holds the active branches of a model.

    Raises:
        UserError: the branches are neither MAGE's four, nor one, nor experts with softmax routers.
    """
    names, routers = tuple(branches_of(model).ranks), _routers(model)
    if routers is None or not (routers or names == ROLES or len(names) == 1):
        raise UserError(
            f"the authors' layout holds the four branches {', '.join(ROLES)}, one branch, or experts under softmax "
            f"routers, found {', '.join(names)}{' with other routers' if routers is None else ''}; "
            "--format peft and peft-merged-rank hold any branches that are not routed"
        )
    return "moelora" if routers else "lora" if len(names) == 1 else "mage"


def to_released(model: nn.Module, extras: Mapping[str, Mapping[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """The active branches of a model in the layout of a released file.

    The released code supports scale 1 only (alpha 32, rank 32): another scale is multiplied into B.

    Args:
        extras: as in `Released`.

    Returns:
        Name to tensor.

    Raises:
        UserError: the branches are neither MAGE's four, nor one, nor experts with softmax routers, or not finite.
    """
    branches, kind, state = branches_of(model), kind_of(model), {}
    routers = _routers(model) or {}
    for layer, pairs in branches.pairs.items():
        for number, (a, b) in enumerate(pairs.values()):
            for half, tensor in (("A", a), ("B", b if branches.scale == 1 else b * branches.scale)):
                place = "" if kind == "lora" else f"lora{half}.{number}."
                state[f"{LLM}{layer}.lora_{half}.default.{place}weight"] = tensor
        if layer in routers:
            state[f"{LLM}{layer}.lora_router.default.weight"] = routers[layer]
    for kind, tensors in (extras or {}).items():
        for name, tensor in tensors.items():
            if kind == "norms":
                name = f"{name.removesuffix('.weight')}.modules_to_save.default.weight"
            state[f"{LLM}{name}" if kind in LANGUAGE_MODEL else name] = tensor
    require_finite(state, "the adapter")
    return state


def _routers(model: nn.Module) -> dict[str, Tensor] | None:
    """Layer to weight of linear softmax routers over branches expert-0, ...; {} without routers; None for others."""
    found = {}
    for name, layer in layers(model).items():
        if layer.router is None:
            continue
        weights = dict(layer.router.named_parameters()) if isinstance(layer.router, nn.Module) else {}
        experts = tuple(f"expert-{number}" for number in range(len(layer.branches)))
        if weights.keys() != {"weight"} or tuple(layer.active) != experts:
            return None
        found[name] = weights["weight"].detach()
    return found


def fitted_routers(model: nn.Module, routers: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """The routers' parameters "weight" in a model's adapter layers, each with the tensor that is for it."""
    found = layers(model)
    own = {name: router for name in routers if isinstance(router := found[name].router, nn.Module)}
    assert own.keys() == routers.keys(), "`kind_of` or the method says that there are routers"
    return [(own[name].get_parameter("weight"), tensor) for name, tensor in routers.items()]


@torch.no_grad()
def put_routers(model: nn.Module, routers: Mapping[str, Tensor]) -> None:
    """Copies routers into those of a model's adapter layers, which have a parameter "weight" of the same shape."""
    for parameter, tensor in fitted_routers(model, routers):
        parameter.copy_(tensor)


@torch.no_grad()
def copy_named(given: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors into those of the same names.

    Args:
        what: begins the error message, as "the file's norms do not fit the model".

    Raises:
        UserError: names the tensors without a counterpart of their shape; nothing is copied then.
    """
    wrong = [
        f"{name} {tuple(tensor.shape)}, expected {tuple(own[name].shape) if name in own else 'no such parameter'}"
        for name, tensor in given.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    wrong += [
        f"{name} has values beyond those of {own[name].dtype}"
        for name, tensor in given.items()
        if name in own and overflows(tensor, own[name].dtype)
    ]
    if wrong:
        raise UserError(f"{what}: {listed(wrong)}")
    for name, tensor in given.items():
        own[name].copy_(tensor)


def put_extras(model: nn.Module, extras: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copies the extra tensors of the language model (`LANGUAGE_MODEL`) into its parameters. Raises as `copy_named`."""
    given = {name: tensor for kind in LANGUAGE_MODEL for name, tensor in extras.get(kind, {}).items()}
    copy_named(given, dict(model.named_parameters()), "the file's embeddings, head or norms do not fit the model")
