"""Linear layers with low-rank branches: y = x W^T + b + scale * sum over branches of drop(x) A_i^T B_i^T, W frozen.

The frozen products are left to the vendor's GEMM. The branches are one product of rank sum(r_i) that is added in the
GEMM's own accumulation; a frozen branch adds to y and costs no gradient. Kept for the backward pass are x and h = drop(x) A^T,
each only where a live branch needs it; the dropout mask is made again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import branches_op

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
        impl: "cpp", "cuda", "triton" or "reference"; None takes the device's best.

    Returns:
        (..., out), of the dtype of x.

    Raises:
        UserError: a shape, dtype or device is wrong, the weight is not frozen, or ``impl`` is missing.

    Reference: Hu et al., arXiv 2106.09685; Continual-NExT, arXiv 2602.18055, Eq. 1; MoELoRA, arXiv 2310.18339.
    """
    options = {"scale": scale, "dropout": dropout, "seed": seed, "independent": independent, "impl": impl}
    return lora_branches_grouped(x, [weight], [bias], [a], [b], routing=routing, **options)[0]


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
) -> list[Tensor]:
    """`lora_branches` for linear layers that read the same x, such as q, k and v: one pass over x, one chain for dX.

    Args:
        weights, biases, a, b: one entry per linear layer. All have the same ranks in the same order, and share the mask.

    Returns:
        One (..., out) per linear layer.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    ranks = _check(x, weights, biases, a, b, dropout, seed, routing)
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    options = (ranks, scale, dropout, independent, impl)
    parts = [part for parts in (*a, *b) for part in parts]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, routing, *parts)):
        return list(_LoraBranches.apply(options, len(weights), x, seed, routing, *weights, *biases, *parts))
    down, ups = _packed(a, b, x.dtype)
    return torch.ops.cnext.lora_branches.default(x, weights, biases, down, ups, seed, routing, *options)[:-1]


def dropout_mask(
    seed: Tensor, rows: int, columns: int, dropout: float, *, branch: int = 0, impl: str | None = None
) -> Tensor:
    """The mask that `lora_branches` applies to x, flattened to (rows, columns): True where an element is kept.

    Args:
        seed: (1,) int64.
        branch: 0 for the shared mask; with ``independent`` the branch's number.
    """
    return torch.ops.cnext.dropout_mask(seed, rows, columns, dropout, branch, impl=impl)


def _packed(
    a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """All down-projections one below the other, and each layer's up-projections side by side, in one dtype."""
    down = _stacked(a[0] if len(a) == 1 else [part for parts in a for part in parts])
    ups = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in b]
    return down.to(dtype), [up.to(dtype) for up in ups]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts one below the other: where they lie so in memory already, as one view of it."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if torch.compiler.is_compiling():
        return torch.cat(parts)
    # Parts that lie end to end inside the first one's storage are one matrix. Storage is compared by address.
    storage, width, size = first.untyped_storage(), first.shape[1], first.element_size()
    place, end = first.data_ptr(), storage.data_ptr() + storage.nbytes()
    rows = 0
    for part in parts:
        if part.data_ptr() != place + rows * width * size or not part.is_contiguous() or part.dtype != first.dtype:
            return torch.cat(parts)
        rows += part.shape[0]
    inside = place + rows * width * size <= end
    return first.as_strided((rows, width), (width, 1)) if inside else torch.cat(parts)


def _live(needed: Sequence[bool], ranks: Sequence[int], linears: int) -> list[int]:
    """The columns of rank from the first to the last branch that any of the layers has a gradient for."""
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    live = [i for i in range(len(ranks)) if any(needed[g * len(ranks) + i] for g in range(linears))]
    return [ends[live[0]] - ranks[live[0]], ends[live[-1]]] if live else [0, 0]


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
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ranks = options[0]
        count = linears * len(ranks)
        weights, biases = list(rest[:linears]), list(rest[linears : 2 * linears])
        parts = rest[2 * linears :]
        down, ups = _packed(*_by_layer(parts, linears), x.dtype)
        *outputs, h = torch.ops.cnext.lora_branches.default(x, weights, biases, down, ups, seed, routing, *options)
        needs = ctx.needs_input_grad
        ctx.needs = needs[2], needs[4]
        ctx.live_a = _live(needs[5 + 2 * linears :][:count], ranks, linears)
        ctx.live_b = _live(needs[5 + 2 * linears + count :], ranks, linears)
        keep_h = ctx.live_b[1] or needs[4]
        ctx.save_for_backward(x if ctx.live_a[1] else None, h if keep_h else None, seed, routing, *weights, *parts)
        ctx.options, ctx.linears = options, linears
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, seed, routing, *rest = ctx.saved_tensors
        linears, ranks = ctx.linears, ctx.options[0]
        weights, parts = rest[:linears], rest[linears:]
        down, ups = _packed(*_by_layer(parts, linears), grads[0].dtype)
        found = iter(
            torch.ops.cnext.lora_branches_backward.default(
                list(grads), x, h, weights, down, ups, ctx.live_a, ctx.live_b, *ctx.needs, seed, routing, *ctx.options
            )
        )
        dx = next(found) if ctx.needs[0] else None
        da = next(found).unflatten(0, (linears, -1)).unbind() if ctx.live_a[1] else None
        db = [next(found) for _ in range(linears)] if ctx.live_b[1] else None
        d_routing = next(found) if ctx.needs[1] else None
        wanted = ctx.needs_input_grad[5 + 2 * linears :]
        split: list[Tensor | None] = []
        for found_, live, dim in ((da, ctx.live_a, 0), (db, ctx.live_b, 1)):
            for g in range(linears):
                begin = -live[0]
                for rank in ranks:
                    place = len(split)
                    narrow = found_[g].narrow(dim, begin, rank).to(parts[place].dtype) if wanted[place] else None
                    split.append(narrow)
                    begin += rank
        return (None, None, dx, None, d_routing, *[None] * (2 * linears), *split)


def _by_layer(parts: Sequence[Tensor], linears: int) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
    """Every A, then every B, as lists per linear layer."""
    branches = len(parts) // (2 * linears)
    layers = [parts[i : i + branches] for i in range(0, len(parts), branches)]
    return layers[:linears], layers[linears:]


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
