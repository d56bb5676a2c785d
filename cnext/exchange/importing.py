"""``cnext import``: write an adapter from elsewhere as a run folder, which ``cnext export`` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext import backbones, methods, packages
from cnext.adapters import (
    MODALITIES,
    exchange,
    exchange_authors,
    exchange_files,
    exchange_peft,
    export_sums,
    layers,
    modalities_of,
)
from cnext.adapters.exchange import Branches
from cnext.adapters.exchange_authors import BESIDE, LANGUAGE_MODEL
from cnext.adapters.logit_check import Reference, agrees
from cnext.adapters.saving import CONFIG
from cnext.backbones.base import Backbone, outer_model
from cnext.errors import UserError, listed, unknown
from cnext.exchange.export import REFERENCE, new_folder
from cnext.exchange.model_card import KIND_OF
from cnext.runs import checkpoint, schemas
from cnext.runs.checkpoint import EXTRAS


def import_adapter(
    path: Path, to: Path, backbone: str = "tiny", method: str | None = None, weights: Path | None = None
) -> str:
    """Writes a PEFT adapter, a folder of several, or a released checkpoint as a run folder. Returns a summary.

    Args:
        path: a file or folder.
        to: a new folder.
        backbone: the model that the adapter was trained for.
        method: one of `model_card.KIND_OF`. None: mage where PEFT adapters have its branches' names, else lora;
            required for a released file of several branches.
        weights: folder of the backbone's weights; None where they come with the package.

    Raises:
        UserError: there is no adapter, it does not fit the backbone, or the model's logits differ from the reference
            logits that were exported with the adapter.
    """
    kind = kind_of(method)
    with new_folder(to) as folder:
        packages.require_installed("cnext import", packages.MODELS)
        packages.require(*packages.MODELS)
        model = backbones.load(backbone).load("cpu", weights)
        connections = {name.partition(".")[0] for name in _connections(model)}
        found, kind = exchange_files.read(path, kind, {*BESIDE, *connections})
        method = method or kind
        modalities = modalities_of(found.branches.ranks) or MODALITIES
        exchange.require_sizes(outer_model(model), found.branches)
        made = methods.load(method)(**hyperparameters_of(found.branches, kind))
        made.setup(model, [], torch.Generator().manual_seed(0), modalities)
        outer = outer_model(model)
        own = exchange.branches_of(outer).ranks
        branches = found.branches.regrouped(own)
        zero = exchange_peft.layers_without(path, branches, layers(outer)) if exchange_files.is_peft(path) else []
        exchange.put_branches(outer, exchange.with_zero_branches(outer, branches, zero))
        exchange_authors.put_routers(outer, found.routers)
        exchange_authors.put_extras(outer, found.extras)
        _put_connections(model, found.extras)
        checked = _check(path, outer, backbone)
        config = _config(path, backbone, method, made, weights) | {"modalities": modalities}
        # Clones: tensors of a file may share their values, which a checkpoint stores once for each.
        extras = {
            f"{kind}.{name}": tensor.clone() for kind, part in found.extras.items() for name, tensor in part.items()
        }
        tensors = {"adapters": made.adapter_parameters(), "method": made.state_dict(), "optimizer": {}, EXTRAS: extras}
        checkpoint.write_json(folder / "config.json", config)
        checkpoint.save(folder / "checkpoints" / "0_imported", tensors, {"tasks_done": 0, "step": 0})
    counted = ", ".join(f"{name} (rank {rank})" for name, rank in own.items())
    lines = [f"{to}: {method} on {backbone}, {len(found.branches.pairs)} layers, branches {counted}"]
    lines += [f"scale {found.branches.scale:g}; reference logits {checked}"]
    lines += [f"zero branches in {len(zero)} layers that the adapter is not for: {listed(zero)}"] if zero else []
    lines += [f"also imported: {kind}, {len(part)} tensors" for kind, part in found.extras.items()]
    lines += [f"ignored: {kind}, {number} tensors" for kind, number in found.ignored.items()]
    beside = exchange_peft.unread(path) if exchange_files.is_peft(path) else []
    unread = [name for name in beside if name not in (REFERENCE, CONFIG, export_sums.FILE)]
    lines += [f"ignored files beside the adapter: {listed(unread)}"] if unread else []
    return "\n".join(lines)


def kind_of(method: str | None) -> str | None:
    """The kind of file that a method's adapters have; None of None. Raises UserError for other methods."""
    if method is not None and method not in KIND_OF:
        raise unknown("method of an adapter", method, list(KIND_OF))
    return method and KIND_OF[method]


def hyperparameters_of(branches: Branches, kind: str) -> dict[str, Any]:
    """The hyperparameters with which methods of a kind have branches of this total rank and scale.

    Raises:
        UserError: the rank cannot be divided among the method's branches.
    """
    ranks = branches.ranks
    modalities = modalities_of(ranks) or MODALITIES
    total, count = sum(ranks.values()), {"mage": 2 * len(modalities), "lora": 1, "moelora": len(ranks)}[kind]
    if total % count:
        raise UserError(f"a total rank of {total} cannot be divided among the {count} branches of {kind}")
    return {"rank": total // count, "scale": branches.scale, **({"experts": count} if kind == "moelora" else {})}


def _check(path: Path, model: torch.nn.Module, backbone: str) -> str:
    """Compares with the reference logits of an export. Returns the outcome; raises UserError where they differ."""
    file = (path if path.is_dir() else path.parent) / REFERENCE
    if not file.is_file():
        return f"not compared: there is no {REFERENCE}"
    if not agrees(model, schemas.read(file, Reference)):
        raise UserError(
            f"{backbone} with this adapter gives other logits than {file} has: the adapter is for another backbone, or "
            f"was changed; delete {REFERENCE} to import it anyway"
        )
    return "as exported"


def _connections(model: Backbone) -> Mapping[str, torch.nn.Parameter]:
    """The connection layers; none of a language model, which refuses to train them."""
    try:
        return model.connections()
    except UserError:
        return {}


def _put_connections(model: Backbone, extras: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copies connection layers into the backbone; where it has none of them, they are kept for the next export only."""
    own = _connections(model)
    given = {name: t for kind, part in extras.items() if kind not in LANGUAGE_MODEL for name, t in part.items()}
    if given.keys() & own.keys():
        what = f"the file's connection layers do not fit backbone {model.name}"
        exchange_authors.copy_named(given, own, what)


def _config(path: Path, backbone: str, method: str, made: Any, weights: Path | None) -> dict[str, Any]:
    hyperparameters = dataclasses.asdict(made)
    values = {"method": method, "hyperparameters": hyperparameters, "backbone": backbone, "tasks": []}
    values["weights"] = None if weights is None else str(weights)
    return values | {"imported": path.resolve().name}
