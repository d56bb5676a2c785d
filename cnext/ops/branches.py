"""Fused linear layers with low-rank branches (LoRA): autograd function and registration with torch.library.

The branches are packed into one of rank sum(r_i) and computed first, by `cnext.ops.low_rank`: scale h B^T is written
into y, and torch accumulates the frozen product on top; likewise drop'(dh A) into dX, and dY W on top. A frozen branch
adds to y and costs no gradient. Saved for the backward pass are x and h = drop(x) A^T, each only where a trained branch
needs it; the dropout mask is recomputed from its seed. Without a weight the branches are computed alone, to be added to
what another library's layer returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import branches_reference, dispatch, low_rank
from cnext.ops.dispatch import BRANCH_IMPLS, BranchImpl, Impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAME = "lora_branches"
_COMMON = "Tensor? seed, Tensor? routing, int[] ranks, float scale, float dropout, bool independent, str? impl=None"
# b: for every linear layer (rank, out), its branches' B transposed, one below the other.
_library = torch.library.Library("cnext", "FRAGMENT")
_library.define(f"{NAME}(Tensor x, Tensor?[] weight, Tensor?[] bias, Tensor a, Tensor[] b, {_COMMON}) -> Tensor[]")
_library.define(
    f"{NAME}_backward(Tensor[] grad, Tensor? x, Tensor? h, Tensor?[] weight, Tensor a, Tensor[] b, "
    f"int[] live_a, int[] live_b, bool needs_x, bool needs_routing, {_COMMON}) -> Tensor[]"
)
_library.define(
    "dropout_mask(Tensor seed, int rows, int columns, float dropout, int branch=0, str? impl=None) -> Tensor"
)


def lora_branches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
    impl: BranchImpl | None = None,
) -> Tensor:
    """A frozen linear layer plus low-rank branches: y = x W^T + bias + scale * sum_i w_i * (drop(x) A_i^T) B_i^T.

    Differentiable in x, A_i, B_i and w, once; under autocast it computes in the autocast dtype. Memory for the backward
    pass: x, and h = drop(x) A^T of (..., sum of r_i); no mask and no dropped copy of x.

    Args:
        x: (..., in) float32, bfloat16, float16 or float64 (no float64 with dropout on a GPU).
        weight, bias: (out, in) and (out,), frozen, in the dtype of x; each may be None. Without a weight, y has the
            branches alone, and `last_path` is "plain": add them to what a quantized layer returns for x.
        a, b: (r_i, in) and (out, r_i) per branch, of any floating dtype; computed in that of x. A branch that requires
            no gradient gets none, and still adds to y.
        scale: factor of the branches, alpha / rank in LoRA.
        dropout: probability of dropping an element of x before the branches, in steps of 2^-16.
        seed: (1,) int64 on the device of x; the same seed drops the same elements. None draws one from torch's default
            generator, so that activation checkpointing and a resumed run repeat the mask.
        independent: a mask for every branch, as released, in place of one that they share.
        routing: (..., branches) weight w of every branch for every token, as in MoELoRA; None: all are 1.
        impl: "cpp", "cuda" or "triton" for the kernels of `cnext.ops.low_rank`; "torch" for the same in plain torch;
            "reference" for the definition, branch after branch, the only one with second derivatives. None takes the
            fastest on the device, see `cnext.ops.dispatch`.

    Returns:
        (..., out), of the dtype of x.

    Raises:
        UserError: a shape, dtype or device does not fit, the weight is not frozen, ``impl`` is unknown or cannot run,
            or the gradient is differentiated (by any but the reference).

    Example:
        >>> x, weight, a, b = torch.randn(5, 16), torch.randn(8, 16), torch.randn(4, 16), torch.zeros(8, 4)
        >>> lora_branches(x, weight, None, [a], [b], dropout=0.05).shape
        torch.Size([5, 8])

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
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    independent: bool = False,
    routing: Tensor | None = None,
    impl: BranchImpl | None = None,
) -> Sequence[Tensor]:
    """`lora_branches` for linear layers that read the same x, such as q, k and v: one pass over x, and one over dX.

    Args:
        x: (..., in).
        weights, biases, a, b: one entry per linear layer, each as `lora_branches` takes it. All layers have the same
            ranks in the same order and share the dropout mask; their ``out`` may differ.
        scale, dropout, seed, independent, routing, impl: as `lora_branches`.

    Returns:
        One (..., out) per linear layer.

    Raises:
        UserError: as `lora_branches`; the layers' ranks differ.

    Example:
        >>> x, weights = torch.randn(5, 16), [torch.randn(8, 16), torch.randn(4, 16)]
        >>> a, b = [[torch.randn(2, 16)], [torch.randn(2, 16)]], [[torch.zeros(8, 2)], [torch.zeros(4, 2)]]
        >>> [tuple(y.shape) for y in lora_branches_grouped(x, weights, [None, None], a, b)]
        [(5, 8), (5, 4)]
    """
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weights = x.to(dtype), [None if w is None else w.to(dtype) for w in weights]
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    ranks = _check(x, weights, biases, a, b, dropout, seed, routing)
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    if impl == "reference":
        dispatch.ran(NAME, impl)
        options = {"scale": scale, "dropout": dropout, "seed": seed, "independent": independent, "routing": routing}
        return branches_reference.lora_branches(x, weights, biases, a, b, **options)
    options = (ranks, scale, dropout, independent, impl)
    downs, ups = (tuple(a[0]), tuple(b[0])) if len(weights) == 1 else (tuple(chain(*a)), tuple(chain(*b)))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, routing, *downs, *ups)):
        return _LoraBranches.apply(options, len(weights), x, seed, routing, *weights, *biases, *downs, *ups)
    packed = _stacked(downs, x.dtype), _transposed(ups, len(weights), x.dtype)
    return _forward(x, weights, biases, *packed, seed, routing, *options)[:-1]


def dropout_mask(
    seed: Tensor, rows: int, columns: int, dropout: float, *, branch: int = 0, impl: Impl | None = None
) -> Tensor:
    """The dropout mask of `lora_branches`, from the counter-based generator Philox 4x32-7.

    Every implementation and device gives the same mask.

    Args:
        seed: (1,) int64, on the device that computes the mask.
        rows, columns: of x, flattened to two dimensions.
        dropout: probability of dropping an element, in steps of 2^-16.
        branch: 0 for the shared mask; with ``independent`` the branch's number.
        impl: "cpp", "cuda", "triton" or "reference"; None for the fastest on the device.

    Returns:
        (rows, columns) bool, True where an element is kept. Elements that are kept are divided by 1 - dropout.

    Raises:
        UserError: ``impl`` is unknown or cannot run.

    Example:
        >>> keep = dropout_mask(torch.tensor([7]), 1000, 8, 0.5)
        >>> keep.shape, round(keep.float().mean().item(), 1)
        (torch.Size([1000, 8]), 0.5)

    Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    return torch.ops.cnext.dropout_mask(seed, rows, columns, dropout, branch, impl=impl)


def _stacked(parts: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts concatenated along dimension 0; a view where they are adjacent in one storage."""
    first = parts[0]
    if len(parts) == 1:
        return first.to(dtype).contiguous()  # kernels read it along its rows
    if torch.compiler.is_compiling():
        return torch.cat(parts).to(dtype)
    # Adjacent parts inside the first one's storage are one matrix.
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


def _transposed(parts: tuple[Tensor, ...] | list[Tensor], linears: int, dtype: torch.dtype) -> list[Tensor]:
    """For every linear layer its parts, transposed and concatenated along dimension 0."""
    count = len(parts) // linears
    packed = [torch.cat([part.T for part in parts[i : i + count]]) for i in range(0, len(parts), count)]
    return [part if part.dtype == dtype else part.to(dtype) for part in packed]


def _live(needed: Sequence[bool], branches: int) -> tuple[int, int]:
    """The first branch for which any layer needs a gradient, and one past the last; (0, 0): none."""
    live = [i % branches for i, need in enumerate(needed) if need]
    return (min(live), max(live) + 1) if live else (0, 0)


class _LoraBranches(torch.autograd.Function):
    """Forward and backward by the two ops. Arguments after ``routing``: weights, biases, every A, every B."""

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
        downs, ups = parts[:half], _transposed(parts[half:], linears, x.dtype)
        *outputs, h = _forward(x, weights, biases, _stacked(downs, x.dtype), ups, seed, routing, *options)
        ctx.live = [_live(needed[begin:][:half], half // linears) for begin in (-2 * half, -half)]
        kept_x = x if ctx.live[0][1] else None
        kept_h = h if ctx.live[1][1] or needed[4] else None
        ctx.save_for_backward(kept_x, kept_h, seed, routing, *weights, *parts)
        ctx.options, ctx.linears, ctx.dtypes = options, linears, [part.dtype for part in parts]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph of the gradients is being made
            with torch.no_grad():
                found = _LoraBranches._gradients(ctx, grads)
            inputs = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            return _Final.apply(*inputs, *found)[len(inputs) :]
        return _LoraBranches._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        x, h, seed, routing, *rest = ctx.saved_tensors
        linears, ranks, needed, live = ctx.linears, ctx.options[0], ctx.needs_input_grad, ctx.live
        weights, half = rest[:linears], len(ctx.dtypes) // 2
        downs, ups = rest[linears:-half], _transposed(rest[-half:], linears, grads[0].dtype)
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


class _Final(torch.autograd.Function):
    """The identity on gradients, whose backward raises: the fused backward pass is not differentiable."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise UserError(
            "lora_branches: its gradient was differentiated, which the fused backward pass does not support; "
            "take impl='reference', or first gradients only (create_graph=False)"
        )


def _check(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    dropout: float,
    seed: Tensor | None,
    routing: Tensor | None,
) -> list[int]:
    """Checks all operands; returns the ranks."""

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
        out = weight.shape[0] if weight is not None else len(ups[0]) if ups else 0
        if weight is not None and (weight.shape != (out, width) or weight.dtype != x.dtype or weight.device != device):
            raise bad("weight", f"(out, {width}) {x.dtype} on {device}", weight)
        if (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad):
            raise UserError(
                "lora_branches: weight or bias requires a gradient; expected both frozen, see requires_grad_(False)"
            )
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


def _flat(x: Tensor) -> Tensor:
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _of(linear: int, h: Tensor, rank: int, live: Sequence[int] = (0, 0)) -> Tensor:
    """A linear layer's columns of h (rows, linears x rank), all or those from live[0] to live[1]."""
    return h[:, linear * rank + live[0] : linear * rank + (live[1] or rank)]


def _clipped(ranks: Sequence[int], live: Sequence[int]) -> list[int]:
    """How much of every branch's rank lies within the columns from live[0] to live[1]."""
    ends = list(accumulate(ranks))
    return [max(0, min(end, live[1]) - max(end - r, live[0])) for end, r in zip(ends, ranks, strict=True)]


def _routed(h: Tensor, routing: Tensor | None, ranks: Sequence[int], linears: int) -> Tensor:
    """h with every branch's columns scaled by the token's weight of that branch."""
    if routing is None:
        return h
    per_branch = routing.reshape(-1, len(ranks)).to(h.dtype)
    columns = [per_branch[:, i : i + 1].expand(-1, rank) for i, rank in enumerate(ranks)]
    return h * torch.cat(columns * linears, 1)


def _run_forward(
    x: Tensor,
    weight: list[Tensor | None],
    bias: list[Tensor | None],
    a: Tensor,
    b: list[Tensor],
    seed: Tensor | None,
    routing: Tensor | None,
    ranks: list[int],
    scale: float,
    dropout: float,
    independent: bool,
    impl: str | None = None,
) -> list[Tensor]:
    flat, rank = _flat(x), sum(ranks)
    path = dispatch.choose(NAME, x.device.type, impl, valid=BRANCH_IMPLS, rows=flat.shape[0])
    random = low_rank.Dropout(seed, dropout, independent, path)
    h = low_rank.project(flat, a, ranks, len(weight), random)
    routed = _routed(h, routing, ranks, len(weight))
    outputs = []
    for g, (w, offset, up) in enumerate(zip(weight, bias, b, strict=True)):
        y = low_rank.expand(_of(g, routed, rank), up, offset, scale, random)
        if w is not None:
            y.addmm_(flat, w.T)
        outputs.append(y if x.ndim == 2 else y.view(*x.shape[:-1], up.shape[1]))
    outputs.append(h)
    dispatch.ran(NAME, _path(weight, random))
    return outputs


def _forward_fake(
    x: Tensor, weight: object, bias: object, a: Tensor, b: list[Tensor], *_: object, **__: object
) -> list[Tensor]:
    rows = x.shape[:-1].numel()
    return [*[x.new_empty(*x.shape[:-1], up.shape[1]) for up in b], x.new_empty(rows, a.shape[0])]


def _run_backward(
    grad: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: list[Tensor | None],
    a: Tensor,
    b: list[Tensor],
    live_a: list[int],
    live_b: list[int],
    needs_x: bool,
    needs_routing: bool,
    seed: Tensor | None,
    routing: Tensor | None,
    ranks: list[int],
    scale: float,
    dropout: float,
    independent: bool,
    impl: str | None = None,
) -> list[Tensor]:
    """dX, dA, each dB and d routing, in this order, those that are needed.

    live_a, live_b: the first column of the rank whose gradient is needed and one past the last; [0, 0]: none. dA is
    (linears x live rank, in), dB (out, live rank). x is needed for dA only, h for dB and d routing.
    """
    grads, linears, rank = [_flat(g) for g in grad], len(grad), sum(ranks)
    rows = grads[0].shape[0]
    path = dispatch.choose(f"{NAME}_backward", grad[0].device.type, impl, valid=BRANCH_IMPLS, rows=rows)
    random = low_rank.Dropout(seed, dropout, independent, path)
    unrouted = grads[0].new_empty(rows, linears * rank) if needs_x or live_a[1] or needs_routing else None
    routed_h = _routed(h, routing, ranks, linears) if live_b[1] and h is not None else None
    d_ups: list[Tensor] = []
    for g, (dy, up) in enumerate(zip(grads, b, strict=True)):
        kept = None if routed_h is None else _of(g, routed_h, rank, live_b)
        d_up = low_rank.grad_h_and_b(dy, up, kept, None if unrouted is None else _of(g, unrouted, rank), scale, random)
        d_ups += [] if d_up is None else [d_up]
    outputs: list[Tensor] = []
    if unrouted is not None:
        dh = _routed(unrouted, routing, ranks, linears)
        if needs_x:
            dx = low_rank.grad_x(dh, a, ranks, linears, random)
            for dy, w in zip(grads, weight, strict=True):
                if w is not None:
                    dx.addmm_(dy, w)
            outputs.append(dx if grad[0].ndim == 2 else dx.view(*grad[0].shape[:-1], dx.shape[1]))
        if live_a[1]:
            assert x is not None, "saved where the gradient of A is wanted"
            live = dh if linears == 1 and live_a[1] - live_a[0] == rank else _alive(dh, live_a, linears)
            outputs.append(low_rank.grad_a(live, _flat(x), _clipped(ranks, live_a), linears, random))
    outputs += d_ups
    if needs_routing:
        assert h is not None, "saved where the gradient of the routing is wanted"
        assert routing is not None
        assert unrouted is not None
        terms = (unrouted * h).view(-1, linears, rank).sum(1)
        sums = torch.stack([part.sum(1) for part in terms.split(ranks, 1)], 1)
        outputs.append(sums.to(routing.dtype).view(routing.shape))
    dispatch.ran(f"{NAME}_backward", _path(weight, random))
    return outputs


def _path(weight: Sequence[Tensor | None], random: low_rank.Dropout) -> str:
    """For `dispatch.last_path`."""
    return "plain" if weight[0] is None else random.ran


def _alive(dh: Tensor, live: Sequence[int], linears: int) -> Tensor:
    """The columns of each linear layer's rank from live[0] to live[1], concatenated."""
    return dh.unflatten(1, (linears, -1))[..., live[0] : live[1]].flatten(1)


def _backward_fake(
    grad: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: object,
    a: Tensor,
    b: list[Tensor],
    live_a: list[int],
    live_b: list[int],
    needs_x: bool,
    needs_routing: bool,
    seed: Tensor | None,
    routing: Tensor | None,
    *_: object,
    **__: object,
) -> list[Tensor]:
    outputs = [a.new_empty(*grad[0].shape[:-1], a.shape[1])] if needs_x else []
    if live_a[1]:
        outputs.append(a.new_empty(len(grad) * (live_a[1] - live_a[0]), a.shape[1]))
    if live_b[1]:
        outputs += [up.new_empty(up.shape[1], live_b[1] - live_b[0]) for up in b]
    return [*outputs, routing.new_empty(routing.shape)] if needs_routing and routing is not None else outputs


def _mask(seed: Tensor, rows: int, columns: int, dropout: float, branch: int = 0, impl: str | None = None) -> Tensor:
    path = dispatch.choose("dropout_mask", seed.device.type, impl)
    keep, path = low_rank.mask(seed, rows, columns, dropout, branch, path)
    dispatch.ran("dropout_mask", path)
    return keep


def _mask_fake(seed: Tensor, rows: int, columns: int, *_: object, **__: object) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.bool)


for _name, _run, _fake in (
    (NAME, _run_forward, _forward_fake),
    (f"{NAME}_backward", _run_backward, _backward_fake),
    ("dropout_mask", _mask, _mask_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cnext::{_name}", _fake, lib=_library)
_forward = torch.ops.cnext.lora_branches.default
_backward = torch.ops.cnext.lora_branches_backward.default
