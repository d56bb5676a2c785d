"""Branches outside a model: extracted from its adapter layers, loaded into another's, or merged into its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cnext.adapters.attach import layers, replace_modules
from cnext.adapters.bases import is_linear, sizes
from cnext.adapters.linear import AdapterLinear
from cnext.errors import UserError, listed

OTHER = "the adapter does not fit the model, is it of another backbone? "
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not floating-point or not finite."""
    return [n for n, t in tensors.items() if t.dtype not in FLOATS or not bool(torch.isfinite(t).all())]


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values of a tensor would be infinite in a dtype."""
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return False
    return not bool(torch.isfinite(tensor.to(dtype)).all())


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError naming the tensors with values that are not finite. what: begins the message."""
    if wrong := not_finite(tensors):
        raise UserError(
            f"{what} would have values that are not finite, in {listed(wrong)}; take an earlier checkpoint, or one of "
            "training with a smaller learning rate"
        )


@dataclass(frozen=True)
class Branches:
    """y = W x + scale * sum over branches of B_i A_i x, with the same branches in every layer.

    pairs: layer to branch to A (rank, in_features) and B (out_features, rank).  scale: alpha / rank.
    """

    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]]
    scale: float = 1.0

    @property
    def ranks(self) -> dict[str, int]:
        """Branch to rank."""
        return {name: len(a) for name, (a, _) in next(iter(self.pairs.values())).items()}

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, as "<layer>.<branch>.<A or B>"."""
        return {
            f"{layer}.{key}.{half}": tensor
            for layer, pairs in self.pairs.items()
            for key, pair in pairs.items()
            for half, tensor in zip("AB", pair, strict=True)
        }

    def regrouped(self, ranks: Mapping[str, int]) -> Branches:
        """The same function as branches of other names and ranks, by concatenation; no value changes.

        sum_i B_i A_i = [B_1 B_2 ...] [A_1; A_2; ...]. Branches that already have these names and ranks, in any order,
        are returned as they are.

        Raises:
            UserError: the ranks have another sum.
        """
        if self.ranks == dict(ranks):
            return self
        if (total := sum(self.ranks.values())) != sum(ranks.values()):
            raise UserError(f"expected branches of a total rank of {sum(ranks.values())}, got {total}: {self.ranks}")
        pairs = {}
        for layer, branches in self.pairs.items():
            rows = torch.cat([a for a, _ in branches.values()]).split(list(ranks.values()))
            columns = torch.cat([b for _, b in branches.values()], 1).split(list(ranks.values()), 1)
            pairs[layer] = dict(zip(ranks, zip(rows, columns, strict=True), strict=True))
        return replace(self, pairs=pairs)


def refuse_routed(model: nn.Module, to: str) -> None:
    """Raises UserError where a layer has a router."""
    if any(layer.router is not None for layer in layers(model).values()):
        raise UserError(
            f"{to} holds branches that are always active, and these are routed by their input; only --format authors "
            "can hold routers, those of moelora"
        )


def refuse_tied(model: nn.Module) -> None:
    """Raises UserError where a layer's weight is another module's too: whoever loads the model would tie them again."""
    adapted: dict[nn.Module, tuple[str, AdapterLinear]] = {
        layer.base: (name, layer) for name, layer in layers(model).items()
    }
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        label, layer = adapted.get(module, (name, None))
        for weight in [layer.unmerged_weight] if layer else module.parameters(recurse=False):
            owners.setdefault(weight.data_ptr(), []).append(label)
    tied = [names for names in owners.values() if len(names) > 1 and any(name in names for name, _ in adapted.values())]
    if tied:
        raise UserError(
            f"a merged model cannot hold branches in weights that several layers own: {' is '.join(tied[0])}; loading "
            "it would tie them again; save_pretrained, and --format peft and authors, hold the branches beside the "
            "weights"
        )


def branches_of(model: nn.Module) -> Branches:
    """The active branches of a model's adapter layers, routed or not, not copied.

    Raises:
        UserError: there are no adapter layers, or no branch is active.
    """
    found = layers(model)
    active = {tuple(layer.active) for layer in found.values()}
    if not any(active):
        raise UserError("expected a model with low-rank branches, found none that is active: nothing to export")
    scales = {layer.scale for layer in found.values()}
    assert len(active) == len(scales) == 1, "attach gives every layer the same branches and scale"
    pairs = {
        name: {key: (layer.branches[key].A.detach(), layer.branches[key].B.detach()) for key in layer.active}
        for name, layer in found.items()
    }
    return Branches(pairs, scales.pop())


def with_zero_branches(model: nn.Module, branches: Branches, names: Collection[str]) -> Branches:
    """The branches, and for further layers of a model its own A with a B of zeros, which add nothing."""
    found = layers(model)
    zeros = {
        name: {key: (one.A.detach(), torch.zeros_like(one.B.detach())) for key, one in found[name].branches.items()}
        for name in names
    }
    return replace(branches, pairs=branches.pairs | zeros)


def require_sizes(model: nn.Module, branches: Branches) -> None:
    """Raises UserError for layers that a model without branches lacks, or has of other sizes.

    It comes before the model is given branches of their rank: few numbers in a file can ask for much memory.
    """
    own = {name: sizes(each) for name, each in model.named_modules(remove_duplicate=False) if is_linear(each)}
    firsts = {layer: next(iter(pairs.values())) for layer, pairs in branches.pairs.items()}
    given = {layer: (a.shape[1], b.shape[0]) for layer, (a, b) in firsts.items()}
    problems = []
    if strange := sorted(given.keys() - own):
        problems.append(f"layers not in the model: {listed(strange)}")
    if wrong := [f"{n} {size}, expected {own[n]}" for n, size in given.items() if n in own and size != own[n]]:
        problems.append(f"inputs and outputs of {listed(wrong)}")
    if problems:
        raise UserError(OTHER + "; ".join(problems))


def fitted(model: nn.Module, branches: Branches) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters of a model's adapter layers, each with the tensor of branches that is for it.

    Raises:
        UserError: layers that are missing or not in the model, or wrong shapes; all are named.
    """
    found = layers(model)
    problems = []
    if missing := sorted(found.keys() - branches.pairs):
        problems.append(f"layers missing: {listed(missing)}")
    if strange := sorted(branches.pairs.keys() - found):
        problems.append(f"layers not in the model: {listed(strange)}")
    wrong = []
    for layer in [name for name in found if name in branches.pairs]:
        own, given = found[layer].branches, branches.pairs[layer]
        if own.keys() != given.keys():
            wrong.append(f"{layer} has branches {', '.join(given)}, expected {', '.join(own)}")
            continue
        for key, pair in given.items():
            for half, tensor, target in zip("AB", pair, (own[key].A, own[key].B), strict=True):
                if tensor.shape != target.shape:
                    wrong.append(f"{layer}.{key}.{half} is {tuple(tensor.shape)}, expected {tuple(target.shape)}")
                elif overflows(tensor, target.dtype):
                    wrong.append(f"{layer}.{key}.{half} has values beyond those of {target.dtype}")
    problems += [listed(wrong)] if wrong else []
    if problems:
        raise UserError(OTHER + "; ".join(problems))
    return [
        (parameter, tensor)
        for layer, pairs in branches.pairs.items()
        for key, pair in pairs.items()
        for parameter, tensor in zip((found[layer].branches[key].A, found[layer].branches[key].B), pair, strict=True)
    ]


@torch.no_grad()
def put_branches(model: nn.Module, branches: Branches) -> None:
    """Copies branches and their scale into a model's adapter layers. Raises as `fitted`, changing nothing."""
    for parameter, tensor in fitted(model, branches):
        parameter.copy_(tensor)
    for layer in layers(model).values():
        layer.scale = branches.scale


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which each adapter layer is replaced by its base layer, with the active branches merged into it.

    Raises:
        UserError: the branches are routed, or were changed after a merge; a layer's weight is quantized, offloaded or
            another module's too; or a sum is too large for the weight's dtype.
    """
    refuse_routed(model, "a merged model")
    for name, layer in layers(model).items():
        layer.require_current()
        if (reason := layer.unmergeable) is not None:
            raise UserError(f"merge: the branches of {name} {reason}")
    refuse_tied(model)
    own = [layer for layer in layers(model).values() if not layer.merged]
    for layer in own:
        layer.merge()
    try:
        sums = {name: layer.base.get_parameter("weight") for name, layer in layers(model).items()}
        require_finite({name: each for name, each in sums.items() if not each.is_meta}, "the merged model")
        with _bases(model):
            yield model
    finally:
        for layer in own:
            layer.unmerge()


@contextmanager
def without_branches(model: nn.Module) -> Iterator[nn.Module]:
    """Context in which each adapter layer is replaced by its base layer, unmerged: the model before `attach`."""
    own = [layer for layer in layers(model).values() if layer.merged]
    for layer in own:
        layer.unmerge()
    try:
        with _bases(model):
            yield model
    finally:
        for layer in own:
            layer.merge()


@contextmanager
def _bases(model: nn.Module) -> Iterator[None]:
    """Context in which each adapter layer is replaced by its base layer."""
    found = layers(model).values()
    replace_modules(model, {layer: layer.base for layer in found})
    try:
        yield
    finally:
        replace_modules(model, {layer.base: layer for layer in found})
