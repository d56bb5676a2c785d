"""Versions, platform, devices, and the available parts of the compiled core."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = (
    "cnext",
    "torch",
    "triton",
    "transformers",
    "peft",
    "diffusers",
    "accelerate",
    "open_clip_torch",
    "numpy",
    "pillow",
)
IMPLS = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of packages that influence results; None where one is not installed."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def describe() -> dict[str, Any]:
    """versions, platform, processor, thread count, devices, and the parts of the compiled core."""
    import torch

    from cnext.ops import dispatch

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "core": {impl: dispatch.missing(impl, device) or _readiness(device) for impl, device in IMPLS.items()},
    }


def _readiness(device: str) -> str:
    import torch

    return "ready" if device == "cpu" or torch.cuda.is_available() else "built, but torch finds no CUDA device"
