"""State hashes per stage, to locate the stage at which two runs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class StateDigest:
    """A row of "digests" in results.json: the `digest` of one stage. trained: its name."""

    stage: int
    trained: str
    sha256: str


def of_run(folder: Path) -> list[StateDigest]:
    """The digests of a run folder, recomputed from its checkpoints between tasks; stage 0 has no checkpoint.

    Raises:
        UserError: a checkpoint is damaged.
    """
    rows = []
    for path in sorted(path.parent for path in folder.glob(f"checkpoints/[!.]*/{checkpoint.MANIFEST}")):
        tensors, values = checkpoint.load(path)
        if not values["step"]:
            rows.append(StateDigest(values["tasks_done"], path.name.partition("_")[2], digest(tensors)))
    return sorted(rows, key=lambda row: row.stage)
