"""Which implementation of an op runs: the compiled core (C++, CUDA), Triton, or plain torch.

``impl=None`` takes the device's best. An explicit ``impl`` is exact, and raises where it is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType

from cnext.errors import UserError, unknown
from cnext.ops import build

IMPLS = ("cpp", "cuda", "triton", "reference")
BEST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
"""What is faster than plain torch on a device type, the best first."""
_PLAIN = ("this op is plain torch only", "")
_last: dict[str, str] = {}


@cache
def core(name: str) -> ModuleType | None:
    """The compiled module ``cnext._cpu`` ("cpp") or ``cnext._cuda`` ("cuda"); None where it was not built."""
    module = {"cpp": "cnext._cpu", "cuda": "cnext._cuda"}[name]
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def _nothing() -> None: ...


@cache
def _triton_interprets() -> bool:
    import triton

    # What triton makes of a function tells it in every version; where the setting is kept has moved.
    return not isinstance(triton.jit(_nothing), triton.JITFunction)


def missing(impl: str, device: str) -> str:
    """Why ``impl`` cannot run on a device type; "" where it can."""
    if impl == "reference":
        return ""
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if importlib.util.find_spec("cnext.kernels") is None:  # which installing puts there, from kernels/triton
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
    """The implementation that ``impl=None`` takes on a device type."""
    reasons = {}
    for impl in BEST.get(device, ()):
        reasons[impl] = missing(impl, device)
        if not reasons[impl]:
            return impl
    why = "".join(f"; {impl}: {reason}" for impl, reason in reasons.items())
    text = f"cnext has no compiled kernels for {device} here and runs on plain torch, many times slower{why}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return "reference"


def choose(op: str, device: str, impl: str | None, compiled: bool = True) -> str:
    """The implementation of ``op`` to run on a device type, remembered for `last_path`.

    Args:
        compiled: whether the op has any other implementation than plain torch.

    Raises:
        UserError: ``impl`` is not known, or cannot run here.
    """
    if impl is not None and impl not in IMPLS:
        raise unknown("impl", impl, IMPLS)
    if impl is not None and (reason := missing(impl, device) if compiled else _PLAIN[impl == "reference"]):
        raise UserError(f"{op}: impl={impl!r} is missing: {reason}")
    _last[op] = impl or (best(device) if compiled else "reference")
    return _last[op]


def last_path(op: str) -> str | None:
    """The implementation that ``op`` last ran ("cpp", "cuda", "triton", "reference"), or None."""
    return _last.get(op)
