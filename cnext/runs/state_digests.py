"""State hashes per stage, to locate the stage at which two runs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.runs import checkpoint

KINDS = ("adapters", "method")
"""The tensors of a digest: the parameters of the method, and its state between tasks."""


def digest(tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """SHA-256 over every tensor of `KINDS` in the order of their names.

    Of each: kind, name, dtype and shape as text, and its bytes in row-major order, little-endian.
    """
    found = hashlib.sha256()
    for kind in KINDS:
        for name, tensor in sorted(tensors[kind].items()):
            found.update(f"{kind}/{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_run(folder: Path) -> list[dict[str, Any]]:
    """The rows that results.json has as "digests", from the checkpoints between the tasks of a run folder.

    Without stage 0, the pretrained model, which has no checkpoint.

    Raises: UserError where a checkpoint is damaged.
    """
    rows = []
    for path in sorted(path.parent for path in folder.glob(f"checkpoints/[!.]*/{checkpoint.MANIFEST}")):
        tensors, values = checkpoint.load(path)
        if not values["step"]:
            rows.append(row(values["tasks_done"], path.name.partition("_")[2], tensors))
    return sorted(rows, key=lambda found: found["stage"])


def row(stage: int, trained: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """The digest of one stage, as results.json has it."""
    return {"stage": stage, "trained": trained, "sha256": digest(tensors)}
