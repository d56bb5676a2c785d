"""Linear layers with low-rank branches: y = x W^T + b + scale * sum over branches of drop(x) A_i^T B_i^T, W frozen.

The matrix products, frozen and low-rank, are the vendor's, through torch: the branches are packed into one of rank
sum(r_i), which adds to the frozen layer's output. Ours is the dropout: a pass of its own in C++ and CUDA, fused with
the low-rank products of x and dX in Triton. Without dropout no kernel of ours runs, whichever ``impl`` is asked for. A
frozen branch adds to y and costs no gradient. Kept for the backward pass are x and h = drop(x) A^T, each only where a
live branch needs it; the dropout mask is made again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import branches_op  # noqa: F401  registers the ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora_branches(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * sum over i of w_i * (drop(x) A_i^T) B_i^T, with gradients for x, A, B and w.

    Args:
        x: (..., in) float32, bfloat16, float16 or float64 (no float64 with dropout on a GPU).
        weight, bias: (out, in) and (out,) or None, frozen, in the dtype of x.
        a, b: (r_i, in) and (out, r_i) per branch, of any floating dtype; computed in that of x. Whatever does not
            require a gradient gets none, and still adds to y.
        scale: factor of the branches.
        dropout: probability of dropping an element of x on the way into the branches, in steps of 2^-16.
        seed: (1,) int64 on the device of x; the same seed drops the same elements. None draws one from torch's own
            generator, which is what makes activation checkpointing and a resumed run repeat the mask.
        independent: a mask for every branch, as released, in place of one that they share.
        routing: (..., branches) weight w of every branch for every token, as in MoELoRA; None: all are 1.
        impl: "cpp", "cuda" or "triton" for the dropout; "torch" for the same passes in plain torch; "reference" for the
            definition, branch after branch. None takes the device's best.

    Returns:
        (..., out), of the dtype of x.

    Raises:
        UserError: a shape, dtype or device is wrong, the weight is not frozen, or ``impl`` is missing.

    Reference: Hu et al., arXiv 2106.09685; Continual-NExT, arXiv 2602.18055, Eq. 1; MoELoRA, arXiv 2310.18339.
    """
    return lora_branches_grouped(
        x,
        (weight,),
        (bias,),
        (a,),
        (b,),
        scale=scale,
        dropout=dropout,
        seed=seed,
        independent=independent,
        routing=routing,
        impl=impl,
    )[0]


def lora_branches_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
    impl: str | None = None,
) -> Sequence[Tensor]:
    """`lora_branches` for linear layers that read the same x, such as q, k and v: one pass over x, one chain for dX.

    Args:
        weights, biases, a, b: one entry per linear layer. All have the same ranks in the same order and share the mask.

    Returns:
        One (..., out) per linear layer.
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    ranks = _check(x, weights, biases, a, b, dropout, seed, routing)
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    options = (ranks, scale, dropout, independent, impl)
    downs, ups = (tuple(a[0]), tuple(b[0])) if len(weights) == 1 else (tuple(chain(*a)), tuple(chain(*b)))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, routing, *downs, *ups)):
        return _LoraBranches.apply(options, len(weights), x, seed, routing, *weights, *biases, *downs, *ups)
    packed = _stacked(downs, x.dtype), _side_by_side(ups, len(weights), x.dtype)
    return _forward(x, weights, biases, *packed, seed, routing, *options)[:-1]


def dropout_mask(
    seed: Tensor, rows: int, columns: int, dropout: float, *, branch: int = 0, impl: str | None = None
) -> Tensor:
    """The mask that `lora_branches` applies to x, flattened to (rows, columns): True where an element is kept.

    Args:
        seed: (1,) int64.
        branch: 0 for the shared mask; with ``independent`` the branch's number.
        impl: "cpp", "cuda", "triton" or "reference"; None takes the device's best.
    """
    return torch.ops.cnext.dropout_mask(seed, rows, columns, dropout, branch, impl=impl)


def _stacked(parts: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts one below the other: where they lie so in memory already, as one view of it."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.dtype == dtype else first.to(dtype)
    if torch.compiler.is_compiling():
        return torch.cat(parts).to(dtype)
    # Parts that lie end to end inside the first one's storage are one matrix.
    width, size = first.shape[1], first.element_size()
    place, rows = first.data_ptr(), 0
    for part in parts:
        if part.data_ptr() != place + rows * width * size or not part.is_contiguous() or part.dtype != first.dtype:
            return torch.cat(parts).to(dtype)
        rows += part.shape[0]
    storage = first.untyped_storage()
    if place + rows * width * size > storage.data_ptr() + storage.nbytes():
        return torch.cat(parts).to(dtype)
    whole = first.as_strided((rows, width), (width, 1))
    return whole if first.dtype == dtype else whole.to(dtype)


def _side_by_side(parts: tuple[Tensor, ...] | list[Tensor], linears: int, dtype: torch.dtype) -> list[Tensor]:
    """Every linear layer's parts as the columns of one matrix."""
    count = len(parts) // linears
    packed = parts if count == 1 else [torch.cat(parts[i : i + count], 1) for i in range(0, len(parts), count)]
    return [part if part.dtype == dtype else part.to(dtype) for part in packed]


def _live(needed: Sequence[bool], branches: int) -> tuple[int, int]:
    """The first branch that any of the layers wants a gradient of, and the one behind the last; (0, 0): none."""
    live = [i % branches for i, need in enumerate(needed) if need]
    return (min(live), max(live) + 1) if live else (0, 0)


class _LoraBranches(torch.autograd.Function):
    """Forward and backward by the two ops; arguments after ``routing``: weights, biases, every A, every B."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[Any, ...],
        linears: int,
        x: Tensor,
        seed: Tensor | None,
        routing: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        weights, biases, parts = rest[:linears], rest[linears : 2 * linears], rest[2 * linears :]
        half, needed = len(parts) // 2, ctx.needs_input_grad
        downs, ups = parts[:half], _side_by_side(parts[half:], linears, x.dtype)
        *outputs, h = _forward(x, weights, biases, _stacked(downs, x.dtype), ups, seed, routing, *options)
        ctx.live = [_live(needed[begin:][:half], half // linears) for begin in (-2 * half, -half)]
        kept_x = x if ctx.live[0][1] else None
        kept_h = h if ctx.live[1][1] or needed[4] else None
        ctx.save_for_backward(kept_x, kept_h, seed, routing, *weights, *parts)
        ctx.options, ctx.linears, ctx.dtypes = options, linears, [part.dtype for part in parts]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, seed, routing, *rest = ctx.saved_tensors
        linears, ranks, needed, live = ctx.linears, ctx.options[0], ctx.needs_input_grad, ctx.live
        weights, half = rest[:linears], len(ctx.dtypes) // 2
        downs, ups = rest[linears:-half], _side_by_side(rest[-half:], linears, grads[0].dtype)
        columns = [(sum(ranks[:begin]), sum(ranks[:end])) for begin, end in live]
        down, wanted = _stacked(downs, grads[0].dtype), (needed[2], needed[4])
        found = iter(_backward(grads, x, h, weights, down, ups, *columns, *wanted, seed, routing, *ctx.options))
        dx = next(found) if needed[2] else None
        parts: list[Tensor | None] = [None] * len(ctx.dtypes)
        for which, (begin, end) in enumerate(live):
            # dA holds the layers one below the other, and every dB stands alone.
            kept, place = ranks[begin:end], which * len(downs) + begin
            pieces = torch.split_with_sizes(next(found), kept * linears) if end and not which else []
            for g in range(linears if end else 0):
                mine = torch.split_with_sizes(next(found), kept, 1) if which else pieces[g * len(kept) :][: len(kept)]
                parts[place + g * len(ranks) : place + g * len(ranks) + len(kept)] = mine
        d_routing = next(found) if needed[4] else None
        given = [
            part if part is None or not need or part.dtype == dtype else part.to(dtype)
            for part, need, dtype in zip(parts, needed[-len(parts) :], ctx.dtypes, strict=True)
        ]
        return None, None, dx, None, d_routing, *[None] * (2 * linears), *given


_forward = torch.ops.cnext.lora_branches.default
_backward = torch.ops.cnext.lora_branches_backward.default


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    dropout: float,
    seed: Tensor | None,
    routing: Tensor | None,
) -> list[int]:
    """The ranks, once everything is seen to fit."""

    def bad(what: str, expected: str, tensor: Tensor) -> UserError:
        came = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        return UserError(f"lora_branches: {what} is {came}; expected {expected}")

    if x.dtype not in DTYPES or not x.ndim:
        raise bad("x", f"(..., in) of {', '.join(map(str, DTYPES))}", x)
    if not 0 <= dropout < 1:
        raise UserError(f"lora_branches: dropout is {dropout}; expected at least 0 and below 1")
    if not len(weights) == len(biases) == len(a) == len(b) > 0:
        raise UserError("lora_branches: weights, biases, a and b must have one entry per linear layer")
    width, device, ranks = x.shape[-1], x.device, [part.shape[0] for part in a[0]]
    for weight, bias, downs, ups in zip(weights, biases, a, b, strict=True):
        out = weight.shape[0]
        if weight.shape != (out, width) or weight.dtype != x.dtype or weight.device != device:
            raise bad("weight", f"(out, {width}) {x.dtype} on {device}", weight)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise UserError("lora_branches: weight or bias requires a gradient; freeze them with requires_grad_(False)")
        if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype or bias.device != device):
            raise bad("bias", f"({out},) {x.dtype} on {device}", bias)
        if not len(downs) == len(ups) == len(ranks) > 0:
            raise UserError(
                f"lora_branches: a has {len(downs)} and b {len(ups)} branches; expected {len(ranks) or 'some'} in both"
            )
        for i, (down, up, rank) in enumerate(zip(downs, ups, ranks, strict=True)):
            if down.shape != (rank, width) or down.device != device:
                raise bad(f"a[{i}]", f"({rank}, {width}) on {device}", down)
            if up.shape != (out, rank) or up.device != device:
                raise bad(f"b[{i}]", f"({out}, {rank}) on {device}", up)
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != device):
        raise bad("seed", f"(1,) torch.int64 on {device}", seed)
    if routing is not None and (routing.shape != (*x.shape[:-1], len(ranks)) or routing.device != device):
        raise bad("routing", f"{(*x.shape[:-1], len(ranks))} on {device}", routing)
    return ranks
