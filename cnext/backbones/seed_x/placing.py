"""Distributes the language model over several devices, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cnext.errors import UserError, unknown

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def plan(
    model: nn.Module, device_map: str, dtype: torch.dtype, memory: Mapping[int | str, int | str] | None = None
) -> dict[str, Any]:
    """Assigns a device to each part of a transformers decoder; decoder layers are not split.

    Args:
        model: on the meta device.
        memory: free bytes of each device; None: as accelerate measures them.

    Returns:
        Name of a part to device.

    Raises:
        UserError: an unknown device map, or accelerators that together have too little memory.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if device_map not in DEVICE_MAPS:
        raise unknown("device map", device_map, DEVICE_MAPS)
    whole: dict[str, Any] = {"no_split_module_classes": model._no_split_modules, "dtype": dtype}
    free: Any = dict(memory or get_max_memory() or {})
    if device_map != "sequential":
        free = get_balanced_memory(model, free, low_zero=device_map == "balanced_low_0", **whole)
    found = infer_auto_device_map(model, free, **whole)
    accelerators = [device for device in free if device not in ("cpu", "disk")]
    left = [name for name, device in found.items() if device in ("cpu", "disk")]
    if accelerators and left:
        raise UserError(
            f"expected the language model to fit on {len(accelerators)} accelerators, {len(left)} of its parts do not, "
            f"{left[0]} first; training needs all of them there: free memory, or use more accelerators"
        )
    return found


def device_of(name: str, placed: Mapping[str, Any], default: torch.device) -> torch.device:
    """The device of a tensor, by its name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next((torch.device(placed[prefix]) for prefix in prefixes if prefix in placed), default)


def connect(model: nn.Module, placed: Mapping[str, Any]) -> None:
    """Adds the hooks that move activations between the devices of parts placed as in ``placed``."""
    from accelerate import dispatch_model

    skipped: Any = model._skip_keys_device_placement
    dispatch_model(model, dict(placed), skip_keys=skipped)
