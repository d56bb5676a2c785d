"""The branches op and its backward as torch.library sees them: products by torch's GEMMs, dropout by our kernels.

With Triton the low-rank products that see dropout are ours as well; see `cnext.ops.branches_passes`. Both ops work on
packed matrices: ``a`` (linears x rank, in), the down-projections of all linear layers that read x one below the other,
and a list ``b`` of (out, rank), where rank is the sum over the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from cnext.ops import branches_passes as passes
from cnext.ops import branches_reference, dispatch

NAME = "lora_branches"
_COMMON = "Tensor? seed, Tensor? routing, int[] ranks, float scale, float dropout, bool independent, str? impl=None"
_library = torch.library.Library("cnext", "FRAGMENT")
_library.define(f"{NAME}(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor a, Tensor[] b, {_COMMON}) -> Tensor[]")
_library.define(
    f"{NAME}_backward(Tensor[] grad, Tensor? x, Tensor? h, Tensor[] weight, Tensor a, Tensor[] b, "
    f"int[] live_a, int[] live_b, bool needs_x, bool needs_routing, {_COMMON}) -> Tensor[]"
)
_library.define(
    "dropout_mask(Tensor seed, int rows, int columns, float dropout, int branch=0, str? impl=None) -> Tensor"
)


def _by_linear(h: Tensor, linears: int) -> Sequence[Tensor]:
    """The columns of each linear layer."""
    return (h,) if linears == 1 else h.chunk(linears, 1)


def _live(h: Tensor, live: Sequence[int], linears: int) -> Tensor:
    """The columns of each linear layer's live rank."""
    if linears == 1:
        return h[:, live[0] : live[1]]
    return h.unflatten(1, (linears, -1))[..., live[0] : live[1]].flatten(1)


def _clipped(ranks: Sequence[int], live: Sequence[int]) -> list[int]:
    """The ranks as far as they lie within the live columns."""
    ends = list(accumulate(ranks))
    return [max(0, min(end, live[1]) - max(end - r, live[0])) for end, r in zip(ends, ranks, strict=True)]


def _routed(h: Tensor, routing: Tensor | None, ranks: Sequence[int], linears: int) -> Tensor:
    """h with every branch's columns times the token's weight of that branch."""
    if routing is None:
        return h
    per_branch = routing.reshape(-1, len(ranks)).to(h.dtype)
    columns = [per_branch[:, i : i + 1].expand(-1, rank) for i, rank in enumerate(ranks)]
    return h * torch.cat(columns * linears, 1)


def _flat(x: Tensor) -> Tensor:
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward(
    x: Tensor,
    weight: list[Tensor],
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
    path = dispatch.choose(NAME, x.device.type, impl, plain="torch")
    if path == "reference":
        options = {"scale": scale, "dropout": dropout, "seed": seed, "independent": independent, "routing": routing}
        parts = branches_reference.unpacked(a, b, ranks)
        outputs, h = branches_reference.with_projections(x, weight, bias, *parts, **options)
        return [*outputs, h]
    flat, random = _flat(x), passes.Dropout(seed, dropout, independent, path)
    h = passes.projected(flat, a, ranks, len(weight), random)
    dispatch.ran(NAME, random.ran)
    routed = _routed(h, routing, ranks, len(weight))
    outputs = []
    for w, offset, up, columns in zip(weight, bias, b, _by_linear(routed, len(weight)), strict=True):
        y = F.linear(flat, w, offset)
        y.addmm_(columns, up.T, alpha=scale)
        outputs.append(y if x.ndim == 2 else y.view(*x.shape[:-1], w.shape[0]))
    outputs.append(h)
    return outputs


def _forward_fake(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], a: Tensor, b: list[Tensor], *_: object, **__: object
) -> list[Tensor]:
    rows = x.shape[:-1].numel()
    return [*[x.new_empty(*x.shape[:-1], w.shape[0]) for w in weight], x.new_empty(rows, a.shape[0])]


def _backward(
    grad: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: list[Tensor],
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
    """dX, dA, each dB and d routing, as far as wanted, in this order.

    live_a, live_b: the first column of rank whose gradient is wanted and the one behind the last, [0, 0]: none. dA is
    (linears x live rank, in), dB (out, live rank). x is needed for dA alone, h for dB and d routing.
    """
    path = dispatch.choose(f"{NAME}_backward", grad[0].device.type, impl, plain="torch")
    if path == "reference":
        options = {"scale": scale, "dropout": dropout, "seed": seed, "independent": independent, "routing": routing}
        parts = branches_reference.unpacked(a, b, ranks)
        dx, da, db, d_routing = branches_reference.lora_branches_backward(grad, x, h, weight, *parts, **options)
        outputs = [dx.view(*grad[0].shape[:-1], dx.shape[1])] if needs_x else []
        if live_a[1]:
            outputs.append(_live(torch.cat(da).T, live_a, len(grad)).T.contiguous())
        if live_b[1]:
            by_linear = [torch.cat(db[i : i + len(ranks)], 1) for i in range(0, len(db), len(ranks))]
            outputs += [_live(one, live_b, 1).contiguous() for one in by_linear]
        if needs_routing and routing is not None:
            outputs.append(torch.stack(d_routing, 1).to(routing.dtype).view(routing.shape))
        return outputs
    grads, linears = [_flat(g) for g in grad], len(grad)
    random = passes.Dropout(seed, dropout, independent, path)
    outputs = []
    if needs_x or live_a[1] or needs_routing:
        parts = [dy @ up if scale == 1.0 else (dy @ up).mul_(scale) for dy, up in zip(grads, b, strict=True)]
        unrouted = parts[0] if linears == 1 else torch.cat(parts, 1)
        dh = _routed(unrouted, routing, ranks, linears)
    if needs_x:
        dx = grads[0] @ weight[0]
        for dy, w in zip(grads[1:], weight[1:], strict=True):
            dx.addmm_(dy, w)
        passes.spread(dx, dh, a, ranks, linears, random)
        outputs.append(dx if grad[0].ndim == 2 else dx.view(*grad[0].shape[:-1], dx.shape[1]))
    if live_a[1]:
        assert x is not None, "saved where the gradient of A is wanted"
        outputs.append(passes.weighed(_live(dh, live_a, linears), _flat(x), _clipped(ranks, live_a), linears, random))
    if live_b[1]:
        assert h is not None, "saved where the gradient of B is wanted"
        routed = _live(_routed(h, routing, ranks, linears), live_b, linears)
        for dy, columns in zip(grads, _by_linear(routed, linears), strict=True):
            db = dy.T @ columns
            outputs.append(db if scale == 1.0 else db.mul_(scale))
    if needs_routing:
        assert h is not None, "saved where the gradient of the routing is wanted"
        assert routing is not None
        terms = (unrouted * h).view(-1, linears, sum(ranks)).sum(1)
        sums = torch.stack([part.sum(1) for part in terms.split(ranks, 1)], 1)
        outputs.append(sums.to(routing.dtype).view(routing.shape))
    dispatch.ran(f"{NAME}_backward", random.ran)
    return outputs


def _backward_fake(
    grad: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: list[Tensor],
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
        outputs += [up.new_empty(up.shape[0], live_b[1] - live_b[0]) for up in b]
    return [*outputs, routing.new_empty(routing.shape)] if needs_routing and routing is not None else outputs


def _mask(seed: Tensor, rows: int, columns: int, dropout: float, branch: int = 0, impl: str | None = None) -> Tensor:
    path = dispatch.choose("dropout_mask", seed.device.type, impl)
    keep, path = passes.mask(seed, rows, columns, dropout, branch, path)
    dispatch.ran("dropout_mask", path)
    return keep


def _mask_fake(seed: Tensor, rows: int, columns: int, *_: object, **__: object) -> Tensor:
    return seed.new_empty(rows, columns, dtype=torch.bool)


for _name, _run, _fake in (
    (NAME, _forward, _forward_fake),
    (f"{NAME}_backward", _backward, _backward_fake),
    ("dropout_mask", _mask, _mask_fake),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cnext::{_name}", _fake, lib=_library)
