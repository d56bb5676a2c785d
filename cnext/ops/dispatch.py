"""Which implementation of an op runs: the compiled core (C++, CUDA), Triton, or plain torch.

``impl=None`` takes the device's best. An explicit ``impl`` is exact, and raises where it is missing. `last_path` names
what an op last ran, by one rule:

- "cpp", "cuda", "triton": a kernel of ours was launched. It need not have done everything: the frozen products of
  `lora_branches` are torch's, and the others as far as `cnext.ops.low_rank` says.
- "reference": the op's definition in plain torch ran, `cnext.ops.reference` or `cnext.ops.branches_reference`.
- "torch": torch's kernels alone ran, and not the definition. That is `lora_branches` and its backward with "cpp" and no
  dropout, where the C++ products do not take the operands; with ``impl="torch"``; and where no kernels of ours are
  there. The plain torch of every other op is its reference.
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
TRITON_FROM_ROWS = 4096
"""From how many rows of x on the branches take Triton on a GPU: the faster one in what was last measured, on an H200
(bench/results): CUDA at 64 and 880 rows, Triton at 14,080."""
SLOWER = "many times slower in averaging and dropout"
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
    if impl in ("torch", "reference"):
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
    """Looking for modules takes longer than a launch."""
    return not missing(impl, device)


def choose(
    op: str,
    device: str,
    impl: str | None,
    compiled: bool = True,
    plain: str = "reference",
    rows: int | None = None,
) -> str:
    """The implementation of ``op`` to run on a device type, remembered for `last_path`.

    Args:
        compiled: whether the op has any other implementation than plain torch.
        plain: what runs where there are no kernels: "torch" for an op whose reference is not meant to be fast.
        rows: of x, for the branches, of which it decides what is fastest.

    Raises:
        UserError: ``impl`` is not known, or cannot run here.
    """
    valid = IMPLS if plain in IMPLS else (*IMPLS[:-1], plain, IMPLS[-1])
    if impl is not None and impl not in valid:
        raise unknown("impl", impl, valid)
    if impl is not None and (reason := missing(impl, device) if compiled else _PLAIN[impl == "reference"]):
        raise UserError(f"{op}: impl={impl!r} is missing: {reason}")
    fastest = best(device) if impl is None and compiled else "reference"
    if fastest == "cuda" and rows is not None and rows >= TRITON_FROM_ROWS and _ready("triton", device):
        fastest = "triton"
    _last[op] = impl or (plain if fastest == "reference" else fastest)
    return _last[op]


def ran(op: str, path: str) -> None:
    """For `last_path`, from an op that knows only afterwards whether it launched anything."""
    _last[op] = path


def last_path(op: str) -> str | None:
    """What ``op`` last ran: "cpp", "cuda", "triton", "torch" or "reference", as said above; None: it has not run."""
    return _last.get(op)
