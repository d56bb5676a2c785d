"""A merged model, a whole transformers model in a folder: its weights in place of those of a model with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnext import adapters
from cnext.adapters.exchange import without_branches
from cnext.backbones.base import Backbone, outer_model
from cnext.backbones.folders import check_config, load_like
from cnext.config.init_source import CONNECTIONS
from cnext.distributed.processes import copy_whole
from cnext.errors import UserError, listed
from cnext.tensor_files import read_tensors

NO_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of config.json that a model's logits do not depend on, beside ids of special tokens."""


def connections(folder: Path) -> dict[str, Tensor]:
    """The tensors of `CONNECTIONS` in a folder, {} where there is no such file."""
    return read_tensors(folder / CONNECTIONS) if (folder / CONNECTIONS).is_file() else {}


def check(folder: Path, backbone: Backbone) -> list[str]:
    """Checks, from names and shapes, that a folder's weights can take the place of a backbone's. Changes nothing.

    Args:
        backbone: perhaps with adapter layers, not sharded.

    Returns:
        What the user should know: entries of config.json that differ, and connection layers that are missing.

    Raises:
        UserError: it is a model of another class or size, tensors are missing, or a weight cannot be replaced.
    """
    model, own, given = outer_model(backbone), _connections(backbone), connections(folder)
    config: Any = model.config
    check_config(folder, config.model_type, _words(model))
    with without_branches(model):
        offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise UserError(f"{listed(offloaded)} are offloaded and cannot be replaced; leave --device-map out")
    loaded = load_like(model, folder, _words(model), device="meta")
    wrong = [
        f"{name} {tuple(tensor.shape)}" + (f", expected {tuple(own[name].shape)}" if name in own else "")
        for name, tensor in given.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        raise UserError(f"{folder / CONNECTIONS} is of another backbone: {listed(wrong)}")
    there, here = _architecture(loaded.config.to_dict()), _architecture(config.to_dict())
    changed = [
        f"{name}: {there[name]} there, {here[name]} here"
        for name in sorted(there.keys() & here.keys())
        if there[name] != here[name]
    ]
    notes = [f"its config.json differs from the backbone's, which is used: {listed(changed)}"] if changed else []
    if given and (still := sorted(own.keys() - given)):
        notes.append(f"it has no {listed(still)}, which are as pretrained")
    return notes


@torch.no_grad()
def put(folder: Path, backbone: Backbone) -> None:
    """Copies a folder's weights, which `check` accepted, into a backbone, sharded or not; of adapter layers the bases.

    Called on all ranks; every one reads the folder.
    """
    model = outer_model(backbone)
    assert not any(layer.merged for layer in adapters.layers(model).values()), "unmerge would discard what is copied"
    loaded = load_like(model, folder, _words(model))
    with without_branches(model):
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, tensor in loaded.named_parameters():
        copy_whole(tensor, parameters[name])
    saved = loaded.state_dict().keys()
    for name, tensor in loaded.named_buffers():
        if name in saved:
            buffers[name].copy_(tensor)
    own = _connections(backbone)
    for name, tensor in connections(folder).items():
        own[name].copy_(tensor)


def _words(model: nn.Module) -> str:
    return f"the weights of a {type(model).__name__} that branches were merged into"


def _architecture(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of a config.json on which logits may depend, those of its parts by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = str(key)  # a number, of labels
        if isinstance(value, Mapping):
            found |= _architecture(value, f"{prefix}{name}.")
        elif name not in NO_ARCHITECTURE and not name.endswith(("_token_id", "_token_ids")):
            found[prefix + name] = value
    return found


def _connections(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Parameters of a backbone's connections that are outside its transformers model, by name; {} if it has none."""
    try:
        found = backbone.connections()
    except UserError:  # a language model has no connections
        return {}
    inside = {id(parameter) for parameter in outer_model(backbone).parameters()}
    return {name: parameter for name, parameter in found.items() if id(parameter) not in inside}
