"""The state of a moving average as a file in a folder, and what it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cnext.averaging import MovingAverage
from cnext.errors import UserError
from cnext.runs.checkpoint import write_bytes

NAME = "moving_average.safetensors"


@dataclass(frozen=True)
class AverageState:
    """What `read` found. tensors: `MovingAverage.state_dict`.  parameters: `digest` of the model's, or nothing.
    base: `digest_of_first` of the others, or nothing.
    step, steps: of the task that was open, 0 between tasks.
    """

    path: Path
    tensors: dict[str, Tensor]
    parameters: str
    base: str
    step: int
    steps: int


def digest(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    found = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_first(parameters: Iterable[Tensor], count: int = 64) -> str:
    """SHA-256 over dtypes, shapes and the first values of each, in order: tells models apart at little cost."""
    found = hashlib.sha256()
    for parameter in parameters:
        parts = getattr(parameter, "__tensor_flatten__", None)  # of a quantized tensor
        for part in [parameter.detach()] if parts is None else [getattr(parameter, name) for name in parts()[0]]:
            found.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
            if not part.is_meta:
                found.update(part.reshape(-1)[:count].cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(folder: Path, average: MovingAverage, parameters: Mapping[str, Tensor], base: str = "") -> None:
    """Writes the average's state, whole or not at all. parameters, base: see `AverageState`."""
    from safetensors.torch import save

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder to write the average's state into")
    about = {"rule": average.name, "parameters": digest(parameters) if parameters else "", "base": base}
    write_bytes(folder / NAME, save(average.state_dict(), about))


def read(folder: Path, average: MovingAverage) -> AverageState:
    """Reads a state of the average's rule.

    Raises:
        UserError: there is none in the folder, it cannot be read, or it is another rule's.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.is_file():
        raise UserError(
            f"{folder} has no {NAME}: training was without this callback, or ended while the checkpoint was written; "
            "resume from an earlier checkpoint"
        )
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        step, steps = (int(tensors[name]) for name in ("step", "steps"))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: expected the state of an average; cannot read it: {error}") from error
    if (rule := about.get("rule")) != average.name:
        raise UserError(f"{path} is of the rule {rule!r}, and the average's is {average.name!r}; use the same")
    return AverageState(path, tensors, about.get("parameters", ""), about.get("base", ""), step, steps)


def forget(average: MovingAverage) -> None:
    """Drops what an average without an open task keeps of earlier tasks: a state that is loaded has all of it."""
    for kind in average.slots().values():
        kind.clear()
