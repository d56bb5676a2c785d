"""Checks of the ops against float64 at the sizes and layouts of a 13B model, beyond the ops' tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnext import ops
from cnext.ops import branches_reference, kron, kron_reference
from cnext.ops.averaging_table import OPS
from cnext.ops.foreach import Op
from evidence.recorder import Recorder, error

NUMBERS = {
    "fisher_accumulate_": {"scale": 0.3},
    "pema_merge_": {"new_scale": 0.7},
    "ema_step_": {"beta": 0.93},
    "pema_step_": {"decay": 0.9, "scale": 1 / 7},
    "pema_literal_": {"damping": 0.7, "scale": 0.3},
    "adamw_pema_step_": {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6},
    "adamw_pema_step_shared_": {"beta1": 0.9, "beta2": 0.98, "eps": 1e-6},
}
SIZES = (40960, 110592, 4096, 4095, 4097, 8, 1, 0, 13824 * 3 + 5)
SMALL = (64, 5, 0)
LAYOUTS = ("aligned", "multiples of 16", "odd", "mixed")
"""All 16-byte aligned; sizes of real models; slices of one buffer at odd offsets; a mix."""
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))

KRON = {"kron_accumulate_": {}, "kron_pull_": {"weight": 0.3}, "kron_merge_": {"c": 0.7, "damping": 1e-3}}
GROUPS = ((5120, (8, 8, 8)), (13824, (8, 8, 8)), (4097, (5, 3, 1)), (1030, (64,)), (77, (16, 16, 1)))


def check(recorder: Recorder) -> None:
    """Every op in every implementation; rows have ``ok``."""
    poison()
    seed = int(time.time()) if recorder.gpu else 0  # the rehearsal is one of our tests: the same each time
    torch.manual_seed(seed)
    recorder.put(seed=seed)
    for layout in LAYOUTS:
        for param, ema in DTYPES:
            for op in OPS.values():
                if op.rules:
                    with recorder.attempt(f"{op.name} {layout} {param} {ema}"):
                        averaging_op(recorder, op, layout, param, ema)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in KRON:
            for gap in (0, 1):
                with recorder.attempt(f"{name} {dtype} gap {gap}"):
                    kron_op(recorder, name, dtype, gap)
    for dtype in (torch.bfloat16, torch.float32):
        for what, options in BRANCHES.items():
            with recorder.attempt(f"branches {what} {dtype}"):
                branches_op(recorder, what, dtype, seed, **options)


def poison() -> None:
    """Fills uninitialized memory with NaN from now on, so that elements that an op does not write are noticed."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory whose results are filled with NaN."""

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        return tensor

    return filled


def drawn(recorder: Recorder, name: str, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Slices of one buffer: random values, with NaN and infinity among gradients and parameters."""
    wanted = list(SIZES if recorder.gpu else SMALL)
    if layout in ("aligned", "multiples of 16"):
        unit = 8 if layout == "aligned" else 16
        wanted = [size - size % unit for size in wanted]
    gap, place = (0, 16) if layout in ("aligned", "multiples of 16") else (1, 16 if layout == "mixed" else 1)
    slab = torch.randn(sum(wanted) + gap * len(wanted) + 64, device=recorder.device)
    if name in ("fisher", "fisher_old", "fisher_new", "exp_avg_sq", "tensors"):  # a sum of both signs may be near 0
        slab = slab.square() * 1e-2
    if name in ("grad", "theta"):
        for bad in (float("nan"), float("inf")):
            slab[torch.rand_like(slab) < 0.02] = bad
    slab, parts = slab.to(dtype), []
    for size in wanted:
        parts.append(slab[place : place + size])
        place += size + gap
    return parts


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies at the same offsets of another buffer."""
    slab = torch.empty(0, dtype=tensors[0].dtype, device=tensors[0].device).set_(tensors[0].untyped_storage()).clone()
    return [slab[tensor.storage_offset() :][: tensor.numel()] for tensor in tensors]


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit but for the payload of NaN."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def averaging_op(recorder: Recorder, op: Op, layout: str, param: torch.dtype, ema: torch.dtype) -> None:
    """Three runs of each implementation: bitwise equal, and with at most twice the error of plain torch."""
    lists = [drawn(recorder, n, {"p": param, "e": ema}.get(r, torch.float32), layout) for n, r in op.roles.items()]
    rows, numbers = [], NUMBERS.get(op.name, {})
    if op.rows[0]:
        table = torch.rand(len(lists[0]), op.rows[1], dtype=torch.float64, device=recorder.device) * 1e-2
        if op.rows[1] == 4:
            table[:, 1:] = torch.tensor([0.99, 0.37, 0.6], dtype=torch.float64, device=recorder.device)
        rows = [table.squeeze(1)]
    wide = [[tensor.double() for tensor in tensors] for tensors in lists]
    exact_counts = op.reference(*wide, *rows, **numbers)
    plain = [alike(tensors) for tensors in lists]
    op.reference(*plain, *rows, **numbers)
    for impl in recorder.impls:
        runs = []
        for _ in range(3):
            mine = [alike(tensors) for tensors in lists]
            runs.append((mine, getattr(torch.ops.cnext, op.name)(*mine, *rows, **numbers, impl=impl)))
        first, counts = runs[0]
        repeatable = all(
            same(a, b)
            for other, _ in runs[1:]
            for x, y in zip(first, other, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        worst = theirs = 0.0
        differ = 0
        for i, name in enumerate(op.roles):
            if name in op.written:
                a, b, c = (torch.cat([x.double() for x in xs[i]]) for xs in (first, wide, plain))
                fine = b.isfinite()
                differ += int((a.isfinite() != fine).sum())
                worst, theirs = max(worst, error(a[fine], b[fine])), max(theirs, error(c[fine], b[fine]))
        counted = None
        if counts is not None:
            exact = exact_counts.view_as(counts)
            fine = exact.isfinite()
            counted = error(counts[fine], exact[fine])
        ok = repeatable and not differ and worst <= 2 * theirs + 1e-6 and (counted is None or counted < 1e-5)
        described = {"layout": layout, "param": param, "ema": ema, "impl": impl, "repeatable": repeatable}
        recorder.put(
            name=op.name, ok=ok, **described, error=worst, plain_error=theirs, counts_error=counted, not_finite=differ
        )


def kron_lists(
    name: str, groups: Sequence[tuple[int, Sequence[int]]], dtype: torch.dtype, device: str, gap: int = 0
) -> tuple[list[list[Tensor]], list[int], list[int]]:
    """Arguments of an op in `cnext.ops.kron`: groups of (n, ranks), transposed where the group's index is even.

    gap: elements of its buffer before each matrix.
    """

    def matrix(*shape: int) -> Tensor:
        return torch.randn(gap + shape[0] * shape[1], device=device).to(dtype)[gap:].view(shape)

    axes = [index % 2 for index, (_, ranks) in enumerate(groups) for _ in ranks]
    sizes = [(n, rank) for n, ranks in groups for rank in ranks]
    lists = []
    for label, kind in kron.OPS[name].lists.items():
        if kind == "part":
            lists.append([matrix(*(s if axis else s[::-1])) for s, axis in zip(sizes, axes, strict=True)])
        elif kind == "rows":
            lists.append([torch.randn(n, device=device).square() for n, _ in groups])
        elif kind == "values":
            lists.append([torch.randn(sum(ranks), device=device).square() for _, ranks in groups])
        elif label == "vectors":  # of any kind: the op does not ask for eigenvectors
            made = [torch.randn(sum(ranks), sum(ranks), device=device) / sum(ranks) ** 0.5 for _, ranks in groups]
            lists.append(made)
        else:
            made = [torch.randn(sum(ranks), 2 * sum(ranks), device=device) / sum(ranks) ** 0.5 for _, ranks in groups]
            lists.append([g @ g.T for g in made])
    return lists, [len(ranks) for _, ranks in groups], axes


def kron_op(recorder: Recorder, name: str, dtype: torch.dtype, gap: int) -> None:
    """Three runs of each implementation: bitwise equal, and with at most twice the error of plain torch."""
    groups = GROUPS if recorder.gpu else ((40, (8, 8)), (7, (3, 1)))
    lists, parts, axes = kron_lists(name, groups, dtype, recorder.device, gap)
    if name == "kron_accumulate_":
        lists[2][0][0, 2], lists[2][-1][1, 0] = float("nan"), float("inf")
    plain, exact = [[[*map(Tensor.clone, xs)] for xs in lists], [[x.double() for x in xs] for xs in lists]]
    for side in (plain, exact):
        getattr(kron_reference, name)(*side, parts, axes, **KRON[name])
    written = [i for i, label in enumerate(kron.OPS[name].lists) if label in kron.OPS[name].written]
    for impl in recorder.impls:
        runs = []
        for _ in range(3):
            mine = [[torch.cat([x.new_zeros(gap), x.flatten()])[gap:].view(x.shape) for x in xs] for xs in lists]
            getattr(kron, name)(*mine, parts, axes, **KRON[name], impl=impl)
            runs.append([x for i in written for x in mine[i]])
        rights, theirs = ([x for i in written for x in side[i]] for side in (exact, plain))
        repeatable = all(same(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        worst = max(error(a, b) for a, b in zip(runs[0], rights, strict=True))
        most = max(error(a, b) for a, b in zip(theirs, rights, strict=True))
        described = {"dtype": dtype, "gap": gap, "impl": impl, "repeatable": repeatable}
        recorder.put(name=name, ok=repeatable and worst <= 2 * most + 1e-6, **described, error=worst, plain_error=most)


BRANCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.05},
    "three layers": {"dropout": 0.05, "linears": 3},
    "a mask for each": {"dropout": 0.05, "independent": True},
    "routed": {"dropout": 0.05, "scale": 0.5, "routed": True},
    # Partial blocks, ranks and widths that kernels pad, and widths whose rows are not 16-byte aligned.
    "a tail of rows": {"dropout": 0.05, "rows": 77},
    "one row": {"dropout": 0.05, "rows": 1},
    "odd rank": {"dropout": 0.05, "rank": 5, "rows": 200},
    "wide rank": {"dropout": 0.05, "rank": 48, "rows": 200},
    "odd width": {"dropout": 0.05, "width": 5125, "rows": 200},
    "a tail of columns": {"dropout": 0.05, "width": 5128, "rows": 200, "scale": 2.0},
}


def branches_op(
    recorder: Recorder,
    what: str,
    dtype: torch.dtype,
    seed: int,
    linears: int = 1,
    routed: bool = False,
    rows: int = 1000,
    width: int = 5120,
    rank: int = 8,
    **options: Any,
) -> None:
    """Outputs and gradients of the branches against float64 with the same dropout mask."""
    rows, width = (rows, width) if recorder.gpu else (min(rows, 100), width - 5120 + 64)
    device = recorder.device

    def draw(*shape: int, live: bool = False, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(live)

    x, routing = draw(rows, width, live=True), draw(rows, 4, live=True) if routed else None
    weights = [draw(width, width, scale=width**-0.5) for _ in range(linears)]
    a = [[draw(rank, width, live=i < 3, scale=width**-0.5) for i in range(4)] for _ in range(linears)]
    b = [[draw(width, rank, live=i < 3, scale=0.1) for i in range(4)] for _ in range(linears)]
    grads = [draw(rows, width) for _ in range(linears)]
    mask_seed = torch.tensor([seed * 7919], device=device)
    if "dropout" in options:
        options["seed"] = mask_seed

    def gradients(function: Callable[..., Sequence[Tensor]], double: bool, **more: Any) -> list[Tensor]:
        def cast(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            return tensor.detach().to(torch.float64 if double else dtype).requires_grad_(tensor.requires_grad)

        mine = cast(x), [*map(cast, weights)], [[*map(cast, t)] for t in a], [[*map(cast, t)] for t in b], cast(routing)
        leaves = [mine[0], mine[4], *(t for lists in (*mine[2], *mine[3]) for t in lists)]
        live = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        ys = function(mine[0], mine[1], [None] * linears, mine[2], mine[3], routing=mine[4], **options, **more)
        found = torch.autograd.grad(ys, live, [cast(grad).detach() for grad in grads])
        return [*(y.detach() for y in ys), *found]

    exact = gradients(branches_reference.lora_branches, True)
    theirs = [error(p, e) for p, e in zip(gradients(branches_reference.lora_branches, False), exact, strict=True)]
    for impl in recorder.impls:
        mine = gradients(ops.lora_branches_grouped, False, impl=impl)
        again = gradients(ops.lora_branches_grouped, False, impl=impl)
        repeatable = all(torch.equal(one, two) for one, two in zip(mine, again, strict=True))
        errors = [error(m, e) for m, e in zip(mine, exact, strict=True)]
        ok = repeatable and all(m <= 1.5 * p + 1e-6 for m, p in zip(errors, theirs, strict=True))
        ratio = max(m / max(p, 1e-12) for m, p in zip(errors, theirs, strict=True))
        path = ops.last_path("lora_branches_backward")
        described = {"dtype": dtype, "impl": impl, "path": path, "repeatable": repeatable}
        recorder.put(name=f"branches, {what}", ok=ok, **described, error=max(errors), error_over_plain=ratio)
    if "seed" in options:
        masks = [
            ops.dropout_mask(mask_seed, rows, width, 0.05, branch=2, impl=i) for i in (*recorder.impls, "reference")
        ]
        ok = all(torch.equal(masks[-1], mask) for mask in masks)
        recorder.put(name="masks of the layers", ok=ok, kept=float(masks[0].double().mean()))
