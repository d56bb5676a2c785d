"""Precision of the frozen model and of the passes through it: dtypes and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context in which a model of that precision computes with trained parameters in float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def in_float32(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same parameters, converted in place: bfloat16 would lose the steps of a small learning rate."""
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters
