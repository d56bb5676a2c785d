"""The averaging rules in Triton: one pass over lists of tensors that a table of addresses in device memory describes.

A program works on one block of one tensor; tables of blocks are kept for the last lists seen. Counts are written per
program and summed per tensor afterwards, in the order of the blocks, so they are the same in every run.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import numpy
import torch

import triton
import triton.language as tl

BLOCK = 1024
WARPS = 8
TYPES = {"f": tl.float32, "b": tl.bfloat16, "h": tl.float16}
_jit = triton.jit(do_not_specialize=["tensors"])


@triton.jit
def _finite(x):
    # Not x - x == 0: where x is a product, the compiler makes that one fused multiply-add, which is rarely 0.
    return tl.abs(x) < float("inf")


@triton.jit
def _mix(ema, theta, beta):
    return theta + beta * (ema - theta)


@triton.jit
def _pointer(addresses, k, tensor, tensors, at, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    base = tl.load(addresses + k * tensors + tensor).to(tl.pointer_type(TYPE))
    return tl.multiple_of(base, ALIGN) + at


@triton.jit
def _place(sizes, block_tensor, block_begin, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tensor, the elements of it (64-bit), and which of them exist."""
    tensor = tl.load(block_tensor + tl.program_id(0))
    at = tl.multiple_of(tl.load(block_begin + tl.program_id(0)), BLOCK) + tl.arange(0, BLOCK)
    return tensor, at, at < tl.multiple_of(tl.load(sizes + tensor), 8 if ALIGN == 16 else 1)


@triton.jit
def _count(partial, k, value, mask, COLUMNS: tl.constexpr):
    tl.store(partial + tl.program_id(0).to(tl.int64) * COLUMNS + k, tl.sum(tl.where(mask, value, 0.0)).to(tl.float64))


@triton.jit
def _level(fisher, level):
    denominator = fisher + level
    return tl.where(denominator > 0.0, level / denominator, 1.0)


@_jit
def fisher_accumulate(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, scale,
                      T0: tl.constexpr, T1: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    fisher_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    fisher = tl.load(fisher_, mask)
    grad = tl.load(_pointer(addresses, 1, tensor, tensors, at, T1, ALIGN), mask).to(tl.float32)
    square = grad * grad * scale
    tl.store(fisher_, tl.where(_finite(square), fisher + square, fisher), mask)


@_jit
def sums(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, T0: tl.constexpr,
         ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    _count(partial, 0, tl.load(_pointer(addresses, 0, tensor, tensors, at, T0, ALIGN), mask, 0.0), mask, 1)


@_jit
def pema_merge(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, new_scale, c, damping,
               T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    theta_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    past_ = _pointer(addresses, 1, tensor, tensors, at, T1, ALIGN)
    theta, past = tl.load(theta_, mask).to(tl.float32), tl.load(past_, mask, 0.0)
    old = tl.load(_pointer(addresses, 2, tensor, tensors, at, T2, ALIGN), mask).to(tl.float32)
    raw = tl.load(_pointer(addresses, 3, tensor, tensors, at, T3, ALIGN), mask, 0.0) * new_scale
    f = tl.where(_finite(raw), raw, 0.0)
    mu = past / c
    beta = tl.where(mu > 0.0, mu / (f + mu + damping), 0.0)
    tl.store(theta_, _mix(old, theta, beta).to(T0), mask)
    tl.store(past_, past + f, mask)
    _count(partial, 0, tl.where(mask, 1.0, 0.0), mask, 5)
    _count(partial, 1, beta, mask, 5)
    _count(partial, 2, beta * beta, mask, 5)
    row = partial + tl.program_id(0).to(tl.int64) * 5
    tl.store(row + 3, tl.min(tl.where(mask, beta, float("inf"))).to(tl.float64))
    tl.store(row + 4, tl.max(tl.where(mask, beta, float("-inf"))).to(tl.float64))


@_jit
def ema_step(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, beta,
             T0: tl.constexpr, T1: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    ema_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    ema = tl.load(ema_, mask).to(tl.float32)
    theta = tl.load(_pointer(addresses, 1, tensor, tensors, at, T1, ALIGN), mask).to(tl.float32)
    tl.store(ema_, tl.where(_finite(theta), _mix(ema, theta, beta), ema).to(T0), mask)


@_jit
def pema_step(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, decay, scale,
              T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
              ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    level = tl.load(rows + tensor).to(tl.float32)
    ema_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    fisher_ = _pointer(addresses, 1, tensor, tensors, at, T1, ALIGN)
    ema, before = tl.load(ema_, mask).to(tl.float32), tl.load(fisher_, mask, 0.0)
    theta = tl.load(_pointer(addresses, 2, tensor, tensors, at, T2, ALIGN), mask, 0.0).to(tl.float32)
    grad = tl.load(_pointer(addresses, 3, tensor, tensors, at, T3, ALIGN), mask, 0.0).to(tl.float32)
    square = grad * grad * scale
    use = _finite(square) & _finite(theta) & mask
    fisher = tl.where(use, before * decay + square, before)
    beta = _level(fisher, level)
    tl.store(ema_, tl.where(use, _mix(ema, theta, beta), ema).to(T0), mask)
    tl.store(fisher_, fisher, mask)
    _count(partial, 0, tl.where(use, 1.0, 0.0), use, 4)
    _count(partial, 1, fisher, mask, 4)
    _count(partial, 2, beta, use, 4)
    _count(partial, 3, beta * beta, use, 4)


@_jit
def pema_literal(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, decay, scale, damping,
                 fallback, clamp, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    ema_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    fisher_ = _pointer(addresses, 1, tensor, tensors, at, T1, ALIGN)
    ema, before = tl.load(ema_, mask, 0.0).to(tl.float32), tl.load(fisher_, mask, 0.0)
    theta = tl.load(_pointer(addresses, 2, tensor, tensors, at, T2, ALIGN), mask, 0.0).to(tl.float32)
    grad = tl.load(_pointer(addresses, 3, tensor, tensors, at, T3, ALIGN), mask, 0.0).to(tl.float32)
    square = grad * grad * scale
    use = _finite(square) & _finite(theta) & mask
    fisher = tl.where(use, before * decay + square, before)
    raw = (grad + 1.0) / ((theta - ema) * fisher + damping)
    inside, low = (raw > 0.0) & (raw < 1.0), raw <= 0.0
    guard = tl.where(clamp != 0.0, tl.where(low, 0.0, 1.0), fallback)
    tl.store(ema_, tl.where(use, _mix(ema, theta, tl.where(inside, raw, guard)), ema).to(T0), mask)
    tl.store(fisher_, fisher, mask)
    _count(partial, 0, tl.where(use, 1.0, 0.0), use, 4)
    _count(partial, 1, tl.where(inside, 1.0, 0.0), use, 4)
    _count(partial, 2, tl.where(low, 1.0, 0.0), use, 4)
    _count(partial, 3, tl.where(inside | low, 0.0, 1.0), use, 4)


@_jit
def dema_norms(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, factor, fallback,
               T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    ema = tl.load(_pointer(addresses, 0, tensor, tensors, at, T0, ALIGN), mask, 0.0).to(tl.float32)
    previous = tl.load(_pointer(addresses, 1, tensor, tensors, at, T1, ALIGN), mask, 0.0).to(tl.float32)
    theta = tl.load(_pointer(addresses, 2, tensor, tensors, at, T2, ALIGN), mask, 0.0).to(tl.float32)
    grad = tl.load(_pointer(addresses, 3, tensor, tensors, at, T3, ALIGN), mask, 0.0).to(tl.float32)
    _count(partial, 0, tl.abs(theta - ema), mask, 3)
    _count(partial, 1, tl.abs(grad), mask, 3)
    _count(partial, 2, tl.abs(grad - previous), mask, 3)


@_jit
def dema_step(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, factor, fallback,
              T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
              ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    row = rows + tensor * 3
    alpha = factor * (1.0 + tl.load(row + 1)) / (tl.load(row) * tl.load(row + 2))
    beta = (1.0 - tl.where((alpha > 0.0) & (alpha < 1.0), alpha, fallback)).to(tl.float32)
    ema_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    ema = tl.load(ema_, mask).to(tl.float32)
    theta = tl.load(_pointer(addresses, 2, tensor, tensors, at, T2, ALIGN), mask).to(tl.float32)
    grad = tl.load(_pointer(addresses, 3, tensor, tensors, at, T3, ALIGN), mask)
    tl.store(ema_, tl.where(_finite(theta), _mix(ema, theta, beta), ema).to(T0), mask)
    tl.store(_pointer(addresses, 1, tensor, tensors, at, T1, ALIGN), grad, mask)


@_jit
def adamw_pema_step(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, weight1, beta2, weight2, eps,
                    decay, scale, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
                    T4: tl.constexpr, T5: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    # T4 is the gradient's type where there is no fisher operand (T5 None), and exp_avg_sq stands in for it.
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    row = rows + tensor * 4
    theta_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    average_ = _pointer(addresses, 1, tensor, tensors, at, T1, ALIGN)
    square_ = _pointer(addresses, 2, tensor, tensors, at, T2, ALIGN)
    ema_ = _pointer(addresses, 3, tensor, tensors, at, T3, ALIGN)
    last_ = _pointer(addresses, 4, tensor, tensors, at, T4, ALIGN)
    theta, average = tl.load(theta_, mask, 0.0).to(tl.float32), tl.load(average_, mask, 0.0)
    square, ema = tl.load(square_, mask, 0.0), tl.load(ema_, mask, 0.0).to(tl.float32)
    last = tl.load(last_, mask, 0.0).to(tl.float32)
    if T5 is None:
        grad = last
    else:
        grad = tl.load(_pointer(addresses, 5, tensor, tensors, at, T5, ALIGN), mask, 0.0).to(tl.float32)
    use = _finite(grad * grad) & _finite(theta) & mask
    m = average + weight1 * (grad - average)
    v = square * beta2 + weight2 * grad * grad
    size, correction = tl.load(row + 2).to(tl.float32), tl.load(row + 3).to(tl.float32)
    moved = theta * tl.load(row + 1).to(tl.float32) - size * m / (tl.sqrt_rn(v) / correction + eps)
    if T5 is None:
        fisher = tl.where(use, v, square)
    else:
        fisher = tl.where(use, last * decay + grad * grad * scale, last)
        tl.store(last_, fisher, mask)
    beta = _level(fisher, tl.load(row).to(tl.float32))
    tl.store(theta_, tl.where(use, moved, theta).to(T0), mask)
    tl.store(average_, tl.where(use, m, average), mask)
    tl.store(square_, tl.where(use, v, square), mask)
    tl.store(ema_, tl.where(use, _mix(ema, moved, beta), ema).to(T3), mask)
    _count(partial, 0, tl.where(use, 1.0, 0.0), use, 4)
    _count(partial, 1, fisher, mask, 4)
    _count(partial, 2, beta, use, 4)
    _count(partial, 3, beta * beta, use, 4)


@triton.jit
def combine(partial, out, first_block, COLUMNS: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """A tensor's counts over its blocks, in their order. Columns from SUMS on: the minimum, then the maximum."""
    tensor, k = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first_block + tensor), tl.load(first_block + tensor + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    least = tl.full((BLOCK,), float("inf"), tl.float64)
    most = tl.full((BLOCK,), float("-inf"), tl.float64)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        value = tl.load(partial + at.to(tl.int64) * COLUMNS + k, at < end, 0.0)
        total += value
        least = tl.minimum(least, tl.where(at < end, value, float("inf")))
        most = tl.maximum(most, tl.where(at < end, value, float("-inf")))
    result = tl.where(k < SUMS, tl.sum(total), tl.where(k == SUMS, tl.min(least), tl.max(most)))
    tl.store(out + tensor * COLUMNS + k, result)


KERNELS = {
    "fisher_accumulate": fisher_accumulate,
    "sums": sums,
    "pema_merge": pema_merge,
    "ema_step": ema_step,
    "pema_step": pema_step,
    "pema_literal": pema_literal,
    "dema_norms": dema_norms,
    "dema_step": dema_step,
    "adamw_pema_step": adamw_pema_step,
    "adamw_pema_step_shared": adamw_pema_step,
}
SUMS = {"pema_merge": 3}


def arguments(rule: str, dtypes: str, scalars: list[float]) -> tuple[list[float], dict[str, object]]:
    """The numbers and the types that the kernel of a rule takes."""
    types: dict[str, object] = {f"T{k}": TYPES[letter] for k, letter in enumerate(dtypes)}
    if rule.startswith("adamw"):
        # 1 - beta in float64: in float32 the difference of two near numbers keeps few digits.
        beta1, beta2, *rest = scalars
        scalars = [1 - beta1, beta2, 1 - beta2, *rest]
    if rule == "adamw_pema_step_shared":
        types |= {"T5": None, "decay": None, "scale": None}  # those of a fisher operand, which this rule has not
    return scalars, types


def _upload(table: numpy.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@lru_cache(maxsize=16)
def _addresses(table: bytes, device: torch.device) -> torch.Tensor:
    return _upload(numpy.frombuffer(table, dtype=numpy.int64).copy(), device)


@lru_cache(maxsize=16)
def _blocks(table: bytes, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sizes; each block's tensor and first element; each tensor's first block."""
    sizes = numpy.frombuffer(table, dtype=numpy.int64).copy()
    count = -(-sizes // BLOCK)
    first = numpy.concatenate([[0], count.cumsum()])
    tensor = numpy.repeat(numpy.arange(len(sizes)), count)
    begin = (numpy.arange(len(tensor)) - first[tensor]) * BLOCK
    return tuple(_upload(t, device) for t in (sizes, tensor.astype(numpy.int32), begin, first.astype(numpy.int32)))


def foreach(
    rule: str,
    dtypes: str,
    pointers: numpy.ndarray,
    sizes: numpy.ndarray,
    scalars: list[float],
    out: torch.Tensor | None,
    rows: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Runs a rule over lists of tensors; see `cnext.ops.foreach`."""
    size, tensor, begin, first = _blocks(sizes.tobytes(), device)
    addresses = _addresses(pointers.tobytes(), device)
    # Addresses and sizes that allow vectors of 16 bytes; otherwise element by element.
    align = 16 if not (pointers % 16).any() and not (sizes % 8).any() else 2
    columns = 0 if out is None else out.shape[1]
    partial = torch.empty((len(tensor), columns), dtype=torch.float64, device=device)
    numbers, types = arguments(rule, dtypes, scalars)
    rows = size if rows is None else rows
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if len(tensor):
            KERNELS[rule][(len(tensor),)](
                addresses, size, tensor, begin, len(sizes), partial, rows, *numbers,
                **types, ALIGN=align, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        if out is not None:
            sums_ = SUMS.get(rule, columns)
            combine[(len(sizes), columns)](partial, out, first, COLUMNS=columns, SUMS=sums_, BLOCK=256)
