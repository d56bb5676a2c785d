"""Frozen layers that branches go beside: `torch.nn.Linear`, dense or quantized, and `Conv1D` of transformers.

Libraries are looked up among what is imported already: a model of their layers has imported them.
"""

from __future__ import annotations

import sys

import torch
from torch import nn


def _classes(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a library, none of one that is not imported."""
    return tuple(getattr(sys.modules[module], name) for name in names if hasattr(sys.modules.get(module), name))


def is_linear(module: object) -> bool:
    """Whether a module is a torch.nn.Linear, its quantized subclasses included, or a Conv1D of transformers."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: object) -> bool:
    """Whether a module is a Conv1D of transformers, as in GPT-2: a linear layer whose weight is (in, out)."""
    return isinstance(module, _classes("transformers.pytorch_utils", "Conv1D"))


def sizes(layer: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer."""
    if is_transposed(layer):
        rows, columns = layer.get_parameter("weight").shape
        return rows, columns
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def has_plain_forward(layer: nn.Module) -> bool:
    """Whether a layer's class computes W x + b and no more, as torch.nn.Linear and Conv1D do."""
    plain = (nn.Linear, *_classes("transformers.pytorch_utils", "Conv1D"))
    return any(type(layer).forward is one.forward for one in plain)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes, which alone can compute with its weight of 4 or 8 bits."""
    return isinstance(layer, _classes("bitsandbytes.nn", "Linear4bit", "Linear8bitLt"))


def is_wrapped(weight: object) -> bool:
    """Whether a tensor is of a subclass that holds other tensors, such as a quantized one of torchao."""
    return hasattr(type(weight), "__tensor_flatten__")


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer is quantized by bitsandbytes or torchao, and computed by its own forward."""
    weight = layer._parameters.get("weight")
    return has_own_forward(layer) or (is_wrapped(weight) and type(weight).__module__.partition(".")[0] == "torchao")


def offloaded_to(layer: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a layer whose weight it loads at each call; None for any other layer."""
    hook = getattr(layer, "_hf_hook", None)
    if hook is None or not getattr(hook, "offload", False):
        return None
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
