"""Choice of an op's implementation: the compiled core (C++, CUDA), Triton or plain torch.

``impl=None`` takes the fastest on the device. An explicit ``impl`` is used or raises. `last_path` names what an op last
ran:

- "cpp", "cuda", "triton": a kernel of cnext was launched. It need not have done everything: the frozen products of
  `lora_branches` are torch's, and so are those that `cnext.ops.low_rank` leaves to torch.
- "reference": the op's definition in plain torch, `cnext.ops.averaging_reference` or `cnext.ops.branches_reference`.
- "torch": torch's kernels alone, but not the definition: `lora_branches` and its backward with ``impl="torch"``, where
  cnext's kernels are missing, and with "cpp" and no dropout where the C++ products do not take the operands. In plain
  torch every other op runs its reference.
- "plain": `lora_branches` without a weight and its backward: the branches alone, by any of these, beside the forward of
  a layer whose weight is not dense.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch

from cnext.errors import UserError, unknown
from cnext.ops import build

Impl = Literal["cpp", "cuda", "triton", "reference"]
"""Implementations of every op."""
BranchImpl = Literal[Impl, "torch"]
"""Implementations of `cnext.ops.lora_branches`."""
IMPLS: tuple[Impl, ...] = get_args(Impl)
BRANCH_IMPLS: tuple[BranchImpl, ...] = get_args(BranchImpl)
ROOT = __name__.removesuffix(".ops.dispatch")
"""The package that kernels are looked for in: cnext, or another name for it in the layout of the kernels hub."""
BEST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
"""What is faster than plain torch on a device type, the best first."""
TRITON_FROM_ROWS = 4096
"""Rows of x from which the branches take Triton on a GPU: the faster one in the last measurement, on an H200
(bench/results): CUDA at 64 and 880 rows, Triton at 14,080."""
SLOWER = "many times slower in averaging and dropout"
_last: dict[str, str] = {}


@cache
def core(name: str) -> ModuleType | None:
    """The compiled module ``cnext._cpu`` ("cpp") or ``cnext._cuda`` ("cuda"); None where it was not built."""
    module = {"cpp": f"{ROOT}._cpu", "cuda": f"{ROOT}._cuda"}[name]
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a GPU is the current device; on a CPU it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _nothing() -> None: ...


@cache
def _triton_interprets() -> bool:
    import triton

    # The type of a jitted function shows it in every version; where the setting is kept has changed.
    return not isinstance(triton.jit(_nothing), triton.JITFunction)


def missing(impl: str, device: str) -> str:
    """Why ``impl`` cannot run on a device type; "" where it can."""
    if impl in ("torch", "reference"):
        return ""
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if importlib.util.find_spec(f"{ROOT}.kernels") is None:  # installed from kernels/triton
            return build.without(impl)
        if device == "cuda" or _triton_interprets():
            return ""
        return f"triton does not run on {device} (set TRITON_INTERPRET=1 before Python starts to interpret it there)"
    if core(impl) is None:
        return build.without(impl)
    needed = {"cpp": "cpu", "cuda": "cuda"}[impl]
    return "" if device == needed else f"it runs on {needed} tensors, and these are on {device}"


@cache
def best(device: str) -> str:
    """The implementation that ``impl=None`` takes on a device type; "reference" stands for plain torch."""
    reasons = {}
    for impl in BEST.get(device, ()):
        reasons[impl] = missing(impl, device)
        if not reasons[impl]:
            return impl
    why = "".join(f"; {impl}: {reason}" for impl, reason in reasons.items())
    text = f"cnext has no compiled kernels for {device} here and runs on plain torch, {SLOWER}{why}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return "reference"


@cache
def _ready(impl: str, device: str) -> bool:
    """`missing`, cached: looking for modules takes longer than a launch."""
    return not missing(impl, device)


def choose(
    op: str,
    device: str,
    impl: str | None,
    compiled: bool = True,
    valid: tuple[str, ...] = IMPLS,
    rows: int | None = None,
) -> str:
    """The implementation of ``op`` to run on a device type, recorded for `last_path`.

    Args:
        compiled: whether the op has kernels; where it has none, ``impl`` may only be "reference".
        valid: the op's implementations. Where "torch" is one, it runs in place of missing kernels, else the reference.
        rows: of x, for the branches: the fastest implementation depends on it.

    Raises:
        UserError: ``impl`` is unknown, or cannot run here.
    """
    if impl is not None and impl not in valid:
        raise unknown("impl", impl, valid)
    if impl is not None and compiled and (reason := missing(impl, device)):
        raise UserError(f"{op}: impl={impl!r} is not available: {reason}")
    if impl not in (None, "reference") and not compiled:
        raise UserError(f"{op}: impl={impl!r} is not available: this op is plain torch only; expected 'reference'")
    fastest = best(device) if impl is None and compiled else "reference"
    if fastest == "cuda" and rows is not None and rows >= TRITON_FROM_ROWS and _ready("triton", device):
        fastest = "triton"
    plain = "torch" if "torch" in valid else "reference"
    _last[op] = impl or (plain if fastest == "reference" else fastest)
    return _last[op]


def ran(op: str, path: str) -> None:
    """Records what ran for `last_path`, by an op that knows it only afterwards."""
    _last[op] = path


def last_path(op: str) -> str | None:
    """What an op last ran on: for tests and benchmarks that must know which kernel they ran.

    Args:
        op: name of the op, such as "pema_step_" or "lora_branches_backward".

    Returns:
        "cpp", "cuda", "triton", "torch", "reference" or "plain", see `cnext.ops.dispatch`; None where it has not run.

    Example:
        >>> from cnext import ops
        >>> total = ops.sums([torch.ones(3)], impl="reference")
        >>> ops.last_path("sums")
        'reference'
    """
    return _last.get(op)
