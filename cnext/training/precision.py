"""The precision of a run: in what the frozen model is held, and in what it is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Inside, a model held in that precision meets parameters that are kept in float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def in_float32(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same parameters, widened in place: steps of a small learning rate would be lost in bfloat16."""
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters
