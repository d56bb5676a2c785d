"""Implementations of a linear layer with four branches of rank 8, three of them trained: cnext's and others'.

`PEERS` maps a name to a factory: adapter layer to a module of the same function. "unsloth" and "lorafusion" are those
projects' algorithms, rewritten here from their descriptions (arXiv 2510.00206 for LoRAFusion) on torch's GEMMs: Unsloth
cannot be imported without a GPU, and LoRAFusion is not packaged. Both, like "peft-rank-32", are one adapter of the
concatenated rank, all of it trained, because neither supports frozen branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import GPU, SMALL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cnext import ops
from cnext.adapters import AdapterLinear, Branch

DTYPE = torch.bfloat16 if GPU else torch.float32
NARROW, WIDE = (5120, 13824) if GPU else (256, 384) if SMALL else (1280, 3456)
RANK, BRANCHES = 8, 4


def adapted(base: nn.Linear, dropout: float) -> AdapterLinear:
    """A linear layer with branches, the last of them frozen."""
    torch.manual_seed(0)
    inner, outer = base.in_features, base.out_features
    branches = {str(i): Branch(torch.randn(RANK, inner) * inner**-0.5, outer) for i in range(BRANCHES)}
    for branch in branches.values():
        nn.init.normal_(branch.B, std=0.1)
    branches[str(BRANCHES - 1)].requires_grad_(False)
    return AdapterLinear(base, branches, dropout=dropout)


class Peer(nn.Module):
    """Base class: the frozen layer, and the branches, one by one or concatenated."""

    def __init__(self, made: AdapterLinear) -> None:
        super().__init__()
        self.base, self.branches, self.p = made.base, made.branches, made.dropout

    def joined(self) -> tuple[Tensor, Tensor]:
        """A, (32, in), and B, (out, 32), of all branches."""
        branches = self.branches.values()
        return torch.cat([branch.A for branch in branches]), torch.cat([branch.B for branch in branches], 1)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p) if self.p and self.training else x


class Released(Peer):
    """The released loop: a mask, a scaling and a routing weight of 1 for every branch, one after another."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for branch in self.branches.values():
            y = y + F.linear(F.linear(self.dropped(x), branch.A), branch.B) * 1.0 * 1.0
        return y


class Concatenated(Peer):
    """One LoRA of the concatenated branches in eager torch."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.joined()
        return self.base(x) + F.linear(F.linear(self.dropped(x), a), b)


class Whole(Peer):
    """One adapter of the concatenated rank, all of it trained."""

    def __init__(self, made: AdapterLinear) -> None:
        super().__init__(made)
        self.a, self.b = map(nn.Parameter, self.joined())
        del self.branches


class Unsloth(Whole):
    """Unsloth's algorithm, rewritten: products added in place, only x saved, h recomputed; without dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return unsloth([self], x)[0]


def unsloth(layers: list[Unsloth], x: Tensor) -> tuple[Tensor, ...]:
    """Layers that read the same x, such as q, k and v: one autograd node, dX accumulated in place."""
    assert not any(layer.p for layer in layers)
    return _Unsloth.apply(x, *(part for layer in layers for part in (layer.base.weight, layer.a, layer.b)))


class _Unsloth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parts)
        ctx.shape, x = x.shape, x.flatten(0, -2)
        outputs = []
        for w, a, b in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            outputs.append((x @ w.T).addmm_(x @ a.T, b.T).view(*ctx.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        x, dx, given = x.flatten(0, -2), None, []
        for dy, w, a, b in zip(grads, parts[::3], parts[1::3], parts[2::3], strict=True):
            dy = dy.flatten(0, -2)
            given += [None, (x.T @ (dy @ b)).T, ((a @ x.T) @ dy).T]
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
            dx.addmm_(dy @ b, a)
        return dx.view(ctx.shape), *given


class LoraFusion(Whole):
    """LoRAFusion's split of the graph, rewritten: a dropout kernel that stores x and its mask; sums inside the GEMMs.

    Its Triton kernel adds the up-projection before the base product's sum; here the vendor's GEMM adds it after.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _LoraFusion.apply(x, self.base.weight, self.a, self.b, self.p if self.training else 0.0)


class _LoraFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
        flat = x.flatten(0, -2)
        dropped, mask = torch.native_dropout(flat, p, True) if p else (flat, None)
        h = dropped @ a.T
        ctx.save_for_backward(dropped, mask, h, w, a, b)
        ctx.p, ctx.shape = p, x.shape
        return (flat @ w.T).addmm_(h, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, h, w, a, b = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        dh, dx = dy @ b, dy @ w
        if mask is None:
            dx.addmm_(dh, a)
        else:
            dx += torch.ops.aten.native_dropout_backward(dh @ a, mask, 1 / (1 - ctx.p))
        return dx.view(ctx.shape), None, dh.T @ dropped, dy.T @ h, None


class By(Peer):
    """cnext's op with an explicit implementation."""

    def __init__(self, made: AdapterLinear, impl: str) -> None:
        super().__init__(made)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        return together([self], x, self.impl)[0]


def together(layers: Sequence[AdapterLinear | By], x: Tensor, impl: str | None = None) -> Sequence[Tensor]:
    """Layers that read the same x in one call of cnext's op."""
    branches = [layer.branches.values() for layer in layers]
    first = layers[0]
    dropout = first.p if isinstance(first, By) else first.dropout
    return ops.lora_branches_grouped(
        x,
        [layer.base.weight for layer in layers],
        [layer.base.bias for layer in layers],
        [[branch.A for branch in mine] for mine in branches],
        [[branch.B for branch in mine] for mine in branches],
        dropout=dropout if first.training else 0.0,
        impl=impl,
    )


def peft(made: AdapterLinear, count: int) -> nn.Module:
    """PEFT's layer with ``count`` adapters, the last of several frozen."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    rank, names = RANK * BRANCHES // count, [str(i) for i in range(count)]
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=made.dropout)
    theirs = LoraLinear(made.base, names[0], config=config, r=rank, lora_alpha=rank)
    for name in names[1:]:
        theirs.update_layer(name, rank, lora_alpha=rank, config=config)
    theirs.set_adapter(names)
    a, b = Peer(made).joined()
    for name, down, up in zip(names, a.split(rank), b.split(rank, 1), strict=True):
        theirs.lora_A[name].weight = nn.Parameter(down.detach().clone())
        theirs.lora_B[name].weight = nn.Parameter(up.detach().clone())
    if count > 1:
        theirs.lora_A[names[-1]].requires_grad_(False)
        theirs.lora_B[names[-1]].requires_grad_(False)
    return theirs


def compiled(made: AdapterLinear) -> nn.Module:
    """The concatenation through torch.compile with fresh caches, as earlier shapes count for its recompile limit."""
    torch.compiler.reset()
    return torch.compile(Concatenated(made), fullgraph=True)


PEERS: dict[str, Callable[[AdapterLinear], nn.Module]] = {
    "cnext": lambda made: made,
    "released": Released,
    "concatenated": Concatenated,
    "compiled": compiled,
    "peft-4": lambda made: peft(made, BRANCHES),
    "peft-rank-32": lambda made: peft(made, 1),
    "unsloth": Unsloth,
    "lorafusion": LoraFusion,
    **({f"cnext-{impl}": lambda made, impl=impl: By(made, impl) for impl in ("cuda", "triton")} if GPU else {}),
}


def peers(dropout: float) -> list[str]:
    """The peers that support this dropout: Unsloth's fast path has none."""
    return [name for name in PEERS if not dropout or name != "unsloth"]


def check(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    grad: Tensor,
    live: Sequence[Tensor],
    exact: Tensor | None = None,
) -> None:
    """Checks a candidate before it is timed; no gradient of ``live`` may be zero.

    Without dropout its output is near the float64 one. With any mask it is linear in x, so that <dX, x> = <dY, y>: a
    backward pass that forgets the mask, or draws another, fails.
    """
    y, fine = function(x), x.dtype == torch.float32
    if exact is not None:
        error = (y.double() - exact).norm() / exact.norm()
        assert error < (1e-5 if fine else 1e-2), f"relative error {error:.1e}"
    dx, *others = torch.autograd.grad(y, [x, *live], grad)
    assert all(bool(found.any()) for found in (dx, *others)), "a gradient is zero"
    sides = (dx.double() * x.double()).sum(), (grad.double() * y.double()).sum()
    typical = grad.double().norm() * y.double().norm() / y.numel() ** 0.5
    assert abs(sides[0] - sides[1]) < (1e-3 if fine else 5e-2) * typical, f"dX does not belong to y: {sides}"


def kept_bytes(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> int:
    """What the graph keeps for its backward pass besides parameters."""
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    assert y.requires_grad
    return sum(kept.values())


def ops_run(function: Callable[[], object]) -> Counter[str]:
    """How often a call runs each of cnext's ops, to check which path a layer took."""
    counts: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "cnext":
                counts[func.name().removeprefix("cnext::")] += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        function()
    return counts
