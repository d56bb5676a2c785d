"""Triton kernels of the averaging ops: one pass over lists of tensors, given as a table of addresses in device memory.

A program works on one block of one tensor. The arithmetic and its rounding are those of csrc/averaging.h, so that both
give the same bits. Statistics are reduced per program, and then per tensor by `combine` in the order of the blocks, so
they are the same in every run.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy
import torch

import triton
import triton.language as tl

BLOCK = 1024
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": False}
"""Eight elements a thread: 16 bytes of bfloat16. No contraction to fused multiply-add: it would round differently from
the C++ and CUDA layers, and ``x * y - x * y`` would not be 0."""
TYPES = {"f": tl.float32, "b": tl.bfloat16, "h": tl.float16}
_jit = triton.jit(do_not_specialize=["tensors"])


@triton.jit
def _finite(x):
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
    """This program's tensor, the indices of its elements (64-bit), and which of them exist."""
    tensor = tl.load(block_tensor + tl.program_id(0))
    at = tl.multiple_of(tl.load(block_begin + tl.program_id(0)), BLOCK) + tl.arange(0, BLOCK)
    return tensor, at, at < tl.multiple_of(tl.load(sizes + tensor), 8 if ALIGN == 16 else 1)


@triton.jit
def _read(addresses, k, tensor, tensors, at, mask, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.load(_pointer(addresses, k, tensor, tensors, at, TYPE, ALIGN), mask, 0.0).to(tl.float32)


@triton.jit
def _count(partial, k, value, mask, COLUMNS: tl.constexpr):
    tl.store(partial + tl.program_id(0).to(tl.int64) * COLUMNS + k, tl.sum(tl.where(mask, value, 0.0)).to(tl.float64))


@triton.jit
def _count_step(partial, use, mask, fisher, beta):
    _count(partial, 0, tl.where(use, 1.0, 0.0), use, 4)
    _count(partial, 1, fisher, mask, 4)
    _count(partial, 2, beta, use, 4)
    _count(partial, 3, beta * beta, use, 4)


@triton.jit
def _beta(fisher, level):
    denominator = fisher + level
    return tl.where(denominator > 0.0, tl.div_rn(level, denominator), 1.0)


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
    mu = tl.div_rn(past, c)
    beta = tl.where(mu > 0.0, tl.div_rn(mu, f + mu + damping), 0.0)
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
    theta = _read(addresses, 2, tensor, tensors, at, mask, T2, ALIGN)
    grad = _read(addresses, 3, tensor, tensors, at, mask, T3, ALIGN)
    square = grad * grad * scale
    use = _finite(square) & _finite(theta) & mask
    fisher = tl.where(use, before * decay + square, before)
    beta = _beta(fisher, level)
    tl.store(ema_, tl.where(use, _mix(ema, theta, beta), ema).to(T0), mask)
    tl.store(fisher_, fisher, mask)
    _count_step(partial, use, mask, fisher, beta)


@_jit
def pema_literal(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, decay, scale, damping,
                 fallback, clamp, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    ema_ = _pointer(addresses, 0, tensor, tensors, at, T0, ALIGN)
    fisher_ = _pointer(addresses, 1, tensor, tensors, at, T1, ALIGN)
    ema, before = tl.load(ema_, mask, 0.0).to(tl.float32), tl.load(fisher_, mask, 0.0)
    theta = _read(addresses, 2, tensor, tensors, at, mask, T2, ALIGN)
    grad = _read(addresses, 3, tensor, tensors, at, mask, T3, ALIGN)
    square = grad * grad * scale
    use = _finite(square) & _finite(theta) & mask
    fisher = tl.where(use, before * decay + square, before)
    raw = tl.div_rn(grad + 1.0, (theta - ema) * fisher + damping)
    inside, low = (raw > 0.0) & (raw < 1.0), raw <= 0.0
    guard = tl.where(clamp != 0.0, tl.where(low, 0.0, 1.0), fallback)
    tl.store(ema_, tl.where(use, _mix(ema, theta, tl.where(inside, raw, guard)), ema).to(T0), mask)
    tl.store(fisher_, fisher, mask)
    _count(partial, 0, tl.where(use, 1.0, 0.0), use, 4)
    _count(partial, 1, tl.where(inside, 1.0, 0.0), use, 4)
    _count(partial, 2, tl.where(low, 1.0, 0.0), use, 4)
    _count(partial, 3, tl.where(inside | low, 0.0, 1.0), use, 4)


@_jit
def dema_norms(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, factor, rest, fallback,
               T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    ema = _read(addresses, 0, tensor, tensors, at, mask, T0, ALIGN)
    previous = _read(addresses, 1, tensor, tensors, at, mask, T1, ALIGN)
    theta = _read(addresses, 2, tensor, tensors, at, mask, T2, ALIGN)
    grad = _read(addresses, 3, tensor, tensors, at, mask, T3, ALIGN)
    _count(partial, 0, tl.abs(theta - ema), mask, 3)
    _count(partial, 1, tl.abs(grad), mask, 3)
    _count(partial, 2, tl.abs(grad - previous), mask, 3)


@_jit
def dema_step(addresses, sizes, block_tensor, block_begin, tensors, partial, rows, factor, rest, fallback,
              T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
              ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, at, mask = _place(sizes, block_tensor, block_begin, ALIGN, BLOCK)
    # Scalars arrive in float32: the factor comes in two parts, and 1 - fallback is computed in float64 on the host.
    row = rows + tensor * 3
    whole = tl.full((), 0.0, tl.float64) + factor + rest
    alpha = whole * (1.0 + tl.load(row + 1)) / (tl.load(row) * tl.load(row + 2))
    beta = tl.where((alpha > 0.0) & (alpha < 1.0), (1.0 - alpha).to(tl.float32), fallback)
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
    # Without a fisher operand (T5 None), operand 4 is the gradient, and exp_avg_sq is the Fisher information.
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
    grad = last if T5 is None else _read(addresses, 5, tensor, tensors, at, mask, T5, ALIGN)
    use = _finite(grad * grad) & _finite(theta) & mask
    m = average + weight1 * (grad - average)
    v = square * beta2 + weight2 * grad * grad
    size, correction = tl.load(row + 2).to(tl.float32), tl.load(row + 3).to(tl.float32)
    moved = theta * tl.load(row + 1).to(tl.float32) - tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
    if T5 is None:
        fisher = tl.where(use, v, square)
    else:
        fisher = tl.where(use, last * decay + grad * grad * scale, last)
        tl.store(last_, fisher, mask)
    beta = _beta(fisher, tl.load(row).to(tl.float32))
    tl.store(theta_, tl.where(use, moved, theta).to(T0), mask)
    tl.store(average_, tl.where(use, m, average), mask)
    tl.store(square_, tl.where(use, v, square), mask)
    tl.store(ema_, tl.where(use, _mix(ema, moved, beta), ema).to(T3), mask)
    _count_step(partial, use, mask, fisher, beta)


@triton.jit
def combine(partial, out, first_block, COLUMNS: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Reduces a tensor's statistics over its blocks, in order. Columns from SUMS on: the minimum, then the maximum."""
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
    """The scalars and the types that the kernel of a rule takes."""
    types: dict[str, object] = {f"T{k}": TYPES[letter] for k, letter in enumerate(dtypes)}
    if rule.startswith("adamw"):
        # 1 - beta in float64: in float32 it would lose digits to cancellation.
        beta1, beta2, *rest = scalars
        scalars = [1 - beta1, beta2, 1 - beta2, *rest]
    elif rule.startswith("dema"):
        factor, fallback = scalars
        single = float(numpy.float32(factor))
        scalars = [single, factor - single, 1 - fallback]
    if rule == "adamw_pema_step_shared":
        types |= {"T5": None, "decay": None, "scale": None}  # of a fisher operand, which this rule does not have
    return scalars, types


_captured: list[tuple[torch.Tensor, ...]] = []
"""Tables that CUDA graphs read, kept forever: nothing tells when a graph is destroyed."""


class Tables:
    """Tables in device memory, and one of addresses, which may differ between calls."""

    remedy = "make the call with cnext.ops.prepare, and call it once before the capture"

    def __init__(self, tables: tuple[numpy.ndarray, ...], device: torch.device) -> None:
        self.tables, self.device = tables, device
        self.uploaded: dict[int, tuple[torch.Tensor, ...]] = {}
        self.addresses: tuple[int, bytes, torch.Tensor] | None = None

    def on_device(self, pointers: numpy.ndarray) -> tuple[torch.Tensor, ...]:
        """Addresses and tables, allocated on the stream that reads them, so that they are freed after its last read."""
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        content = pointers.tobytes()
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if self.addresses is None or self.addresses[1] != content:
                raise ValueError(
                    "Triton reads the addresses from a table in device memory, and none can be copied there while a "
                    f"CUDA graph is captured: {self.remedy}"
                )
            kept = (self.addresses[2], *self.uploaded[self.addresses[0]])
            _captured.append(kept)
            return kept
        if stream not in self.uploaded:
            self.uploaded[stream] = tuple(_upload(table, self.device) for table in self.tables)
        if self.addresses is None or self.addresses[:2] != (stream, content):
            self.addresses = stream, content, _upload(pointers.copy(), self.device)
        return (self.addresses[2], *self.uploaded[stream])


class Lists(Tables):
    """Launches rules over lists of tensors of given sizes, and keeps their tables in device memory.

    Args:
        sizes: (tensors,) elements.
    """

    def __init__(self, sizes: numpy.ndarray, device: torch.device) -> None:
        self.sizes = sizes
        count = -(-sizes // BLOCK)
        first = numpy.concatenate([[0], count.cumsum()])
        tensor = numpy.repeat(numpy.arange(len(sizes)), count)
        begin = (numpy.arange(len(tensor)) - first[tensor]) * BLOCK
        self.blocks = len(tensor)
        super().__init__((sizes, tensor.astype(numpy.int32), begin, first.astype(numpy.int32)), device)

    def __call__(
        self,
        rule: str,
        dtypes: str,
        pointers: numpy.ndarray,
        scalars: list[float],
        out: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> None:
        """Runs a rule; see `cnext.ops.foreach`."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            addresses, size, tensor, begin, first = self.on_device(pointers)
            # 16 where addresses and sizes allow accesses of 16 bytes.
            align = 16 if not (pointers % 16).any() and not (self.sizes % 8).any() else 2
            columns = 0 if out is None else out.shape[1]
            partial = torch.empty((self.blocks, columns), dtype=torch.float64, device=self.device)
            numbers, types = arguments(rule, dtypes, scalars)
            rows = size if rows is None else rows
            if self.blocks:
                KERNELS[rule][(self.blocks,)](
                    addresses, size, tensor, begin, len(self.sizes), partial, rows, *numbers,
                    **types, ALIGN=align, BLOCK=BLOCK, **OPTIONS,
                )  # fmt: skip
            if out is not None:
                sums_ = SUMS.get(rule, columns)
                grid = (len(self.sizes), columns)
                combine[grid](partial, out, first, COLUMNS=columns, SUMS=sums_, BLOCK=256)


def _upload(table: numpy.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
