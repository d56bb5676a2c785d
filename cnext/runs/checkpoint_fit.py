"""Whether the tensors of a checkpoint are a model's and a method's. Its checksums say only that they are as written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from cnext.errors import UserError, listed
from cnext.methods.base import Method
from cnext.runs import state_digests
from cnext.runs.checkpoint import MANIFEST

ADVICE = "it is of another model or was changed; delete this checkpoint, or give another --out"


def require_fit(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
    sha256: str | None = None,
) -> None:
    """Compares names, shapes and dtypes of a checkpoint's adapters and moments with the parameters; copies nothing.

    Args:
        tensors: what `checkpoint.load` returned.
        parameters: all that a checkpoint of the run stores, by name.
        sha256: the digest of its stage, see `state_digests`; None where it is not known.

    Raises:
        UserError: a file of tensors is missing, a tensor is missing, strange or of another shape or dtype, or the
            digest is another.
    """
    if lost := [f"{name}.safetensors" for name in ("adapters", "method", "optimizer") if name not in tensors]:
        raise UserError(f"{folder} does not fit the run: it lacks {listed(lost)}; {ADVICE}")
    own = {name: _kind(parameter) for name, parameter in parameters.items()}
    _compare(folder / "adapters.safetensors", {name: _kind(t) for name, t in tensors["adapters"].items()}, own)
    for label, tensor in tensors["optimizer"].items():
        moment, _, name = label.partition(":")
        expected = "float32 ()" if moment == "step" else own.get(name, "no such parameter")
        _compare(folder / "optimizer.safetensors", {label: _kind(tensor)}, {label: expected})
    if sha256 is not None and state_digests.digest(tensors) != sha256:
        raise UserError(f"{folder}: its tensors are not those of the digest in its {MANIFEST}; {ADVICE}")


def restore(folder: Path, method: Method, state: Mapping[str, Tensor]) -> None:
    """`Method.load_state_dict` of a checkpoint's tensors.

    Raises:
        UserError: the method cannot load them, or has other ones afterwards.
    """
    file = folder / "method.safetensors"
    try:
        method.load_state_dict(dict(state))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{file} does not fit the method: {reason}; {ADVICE}") from error
    found = {name: _kind(tensor) for name, tensor in method.state_dict().items()}
    _compare(file, {name: _kind(tensor) for name, tensor in state.items()}, found)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _compare(file: Path, given: Mapping[str, str], own: Mapping[str, str]) -> None:
    wrong = [
        f"{name} is {given.get(name, 'missing')}, expected {own.get(name, 'no such tensor')}"
        for name in sorted(given.keys() | own)
        if given.get(name) != own.get(name)
    ]
    if wrong:
        raise UserError(f"{file} does not fit the run: {listed(wrong, 3)}; {ADVICE}")
