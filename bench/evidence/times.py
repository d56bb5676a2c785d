"""Benchmarks of a GPU: peak rates, averaging step, branches, decoder layer, and a profile."""

from __future__ import annotations

import copy
import importlib
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import timing
import torch
import triton

from cnext import ops
from cnext.ops import dispatch
from evidence.check import KRON, kron_lists
from evidence.recorder import Recorder


def ceilings(recorder: Recorder) -> None:
    """Card, versions, memory bandwidth, and the matrix products that the branches are made of."""
    if recorder.gpu:
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        card = torch.cuda.get_device_properties(0)
        recorder.put(gpu=card.name, multiprocessors=card.multi_processor_count, l2=card.L2_cache_size, smi=said.stdout)
    layers = {impl: dispatch.missing(impl, "cpu" if impl == "cpp" else recorder.device) for impl in dispatch.IMPLS[:3]}
    recorder.put(torch=torch.__version__, cuda=torch.version.cuda, triton=triton.__version__, missing=layers)
    with recorder.attempt("copies"):
        copies(recorder)
    shapes = ((8192, 8192, 8192), (14080, 5120, 5120), (14080, 5120, 13824), (14080, 13824, 5120))
    for shape in shapes if recorder.gpu else ((64, 64, 64),):
        with recorder.attempt(f"products {shape}"):
            products(recorder, *shape)


def copies(recorder: Recorder) -> None:
    """Memory bandwidth: one stream read and one written, and two read and one written."""
    size = 2**30 if recorder.gpu else 2**20
    x, y = torch.randn(size, device=recorder.device), torch.empty(size, device=recorder.device)
    half = size // 2
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "copy": (2, lambda: y.copy_(x)),
        "copy by a kernel": (2, lambda: torch.mul(x, 1.0, out=y)),
        "sum of two": (1.5, lambda: torch.add(x[:half], x[half:], out=y[:half])),
    }
    # Without a graph: a captured copy takes another path, and was a third slower on an H200.
    for name, row in recorder.race({n: call for n, (_, call) in calls.items()}, 12, graph=False).items():
        moved = calls[name][0] * x.nbytes
        recorder.put(name=name, counted="bytes read and bytes written", tb_per_s=moved / row["ms"] / 1e9, **row)


def products(recorder: Recorder, m: int, k: int, n: int) -> None:
    """A frozen layer's product, overwriting and accumulating, and the branches' low-rank products."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=recorder.device, dtype=torch.bfloat16)

    x, weight, y, h, up = draw(m, k), draw(n, k), draw(m, n), draw(m, 32), draw(n, 32)
    found = recorder.race(
        {
            "product": lambda: x @ weight.T,
            "product, added": lambda: y.addmm_(x, weight.T),
            "rank 32 up": lambda: h @ up.T,
            "rank 32 up, added": lambda: y.addmm_(h, up.T),
            "down to rank 32": lambda: x @ weight[:32].T,
            "gradient of rank 32": lambda: h.T @ x,
        },
        10,
    )
    for name, row in found.items():
        flops = {"tflops": 2 * m * n * k / row["ms"] / 1e9} if name.startswith("product") else {}
        recorder.put(name=name, shape=(m, k, n), **flops, **row)


def averaging(recorder: Recorder) -> None:
    """The ops as CUDA graphs, host time of a call, and DEMA as released; 93.9 million parameters on a GPU."""
    bench: Any = importlib.import_module("bench_averaging")
    level, parameters = bench.LEVEL, bench.PARAMETERS

    def timed(what: str, candidates: dict[str, tuple[float, Callable[[], object]]]) -> None:
        with recorder.attempt(what):
            for name, row in recorder.race({n: call for n, (_, call) in candidates.items()}, 15).items():
                traffic = candidates[name][0]
                moved = parameters * traffic / row["ms"] / 1e6
                recorder.put(name=name, parameters=parameters, bytes_per_parameter=traffic, gb_per_s=moved, **row)

    lists = bench.filled(1e-2, 1e-3, -1e-3, 1e-2)
    narrow = [[x.to(torch.bfloat16) for x in xs] if k < 2 else xs for k, xs in enumerate(copy.deepcopy(lists))]
    steps: dict[str, tuple[float, Callable[[], object]]] = {}
    for impl in recorder.impls:
        for kind, given, traffic in (("float32", lists, 24), ("bfloat16", narrow, 20)):
            step = ops.prepare("pema_step_", *given, impl=impl)
            steps[f"pema_step, {impl}, {kind}"] = traffic, lambda step=step: step(level)
    timed("pema_step", {**steps, "foreach": (96, lambda: bench.foreach(*lists, level))})
    other = bench.filled(1e-2, 1e-3, 1e-2, 1e-3)
    dema = ops.prepare("dema_step_", *other)
    timed(
        "other rules",
        {
            "dema_step": (36, dema),
            "ema_step": (12, lambda: ops.ema_step_(lists[0], lists[3], beta=0.99)),
            "fisher_accumulate": (12, lambda: ops.fisher_accumulate_(lists[2], lists[1])),
            "pema_merge": (24, lambda: ops.pema_merge_(lists[0], lists[3], lists[2], other[2], new_scale=1.0)),
        },
    )
    theta, grad, m, v, fisher, ema = bench.filled(1e-2, 1e-3, 1e-4, -1e-3, -1e-3, 1e-2)
    weights = [torch.nn.Parameter(x) for x in theta]
    for weight, g in zip(weights, grad, strict=True):
        weight.grad = g
    options = {key: value for key, value in bench.ADAMW.items() if key != "step"}
    optimizer = torch.optim.AdamW(weights, **options, fused=True, capturable=recorder.gpu)
    one = ops.prepare("adamw_pema_step_", theta, grad, m, v, fisher, ema)
    shared = ops.prepare("adamw_pema_step_", theta, grad, m, v, None, ema)
    timed(
        "adamw",
        {
            "torch's fused AdamW": (28, optimizer.step),
            "AdamW and pema_step": (44, lambda: one(level, **bench.ADAMW)),
            "AdamW and pema_step, v as Fisher": (36, lambda: shared(level, **bench.ADAMW)),
        },
    )
    previous_grads = dict(enumerate(other[3]))
    prepared = ops.prepare("pema_step_", *lists)
    per_call = ops.prepare("pema_step_", lists[0], None, *lists[2:])
    calls: dict[str, Callable[[], object]] = {
        "pema_step": lambda: ops.pema_step_(*lists, level),
        "pema_step, prepared": lambda: prepared(level),
        "pema_step, prepared, gradients per call": lambda: per_call(level, grad=lists[1]),
        "dema_step, prepared": dema,
        "AdamW and pema_step, prepared": lambda: one(level, **bench.ADAMW),
        "eager": lambda: bench.eager(*lists, level),
        "foreach": lambda: bench.foreach(*lists, level),
        "DEMA as released": lambda: bench.dema_released(*other[:3], previous_grads),
    }
    for name, call in calls.items():
        with recorder.attempt(name):
            rounds = 3 if name in ("eager", "DEMA as released") else 20
            recorder.put(
                name=f"{name}, a call", tensors=len(lists[0]), **timing.call_ms(call, rounds if recorder.gpu else 2)
            )
    for name, call in calls.items():
        if name.startswith("pema_step"):
            with recorder.attempt(f"launches of {name}"):
                found = timing.kernels(call)
                launches = sum(times for _, times, _ in found)
                recorder.put(name=f"launches of {name}", launches=launches, kernels=[key[:80] for key, *_ in found])


def kron(recorder: Recorder) -> None:
    """The Kronecker ops as CUDA graphs, on the parameters of `averaging`; the merge on those of one layer."""
    bench: Any = importlib.import_module("bench_averaging")
    ranks = (bench.RANK,) * bench.LIVE
    layer = [(n, ranks) for linear in bench.LINEARS for n in linear]  # the A, transposed, and the B of each linear
    # Numbers moved per element, and per row and group.
    traffic = {"kron_accumulate_": (1, 2), "kron_pull_": (3, 1), "kron_merge_": (3, 2)}
    for name, (moved, of_rows) in traffic.items():
        groups = layer if name == "kron_merge_" else layer * bench.LAYERS
        elements, rows = (sum(n * width for n, _ in groups) for width in (sum(ranks), 1))
        for dtype in (torch.float32, torch.bfloat16):
            with recorder.attempt(f"{name} {dtype}"):
                given = kron_lists(name, groups, dtype, recorder.device)
                op = partial(getattr(ops.kron, name), *given[0], *given[1:], **KRON[name])
                calls = {impl: partial(op, impl=impl) for impl in recorder.impls}
                for impl, row in recorder.race(calls, 5 if name == "kron_merge_" else 12).items():
                    size = elements * moved * dtype.itemsize + rows * of_rows * 4
                    label = f"{name}, {impl}, {str(dtype).removeprefix('torch.')}"
                    recorder.put(name=label, elements=elements, bytes=size, gb_per_s=size / row["ms"] / 1e6, **row)


def branches(recorder: Recorder, names: tuple[str, ...] = ()) -> None:
    """Layers of LLaMA2-13B with branches, forward and backward, relative to the frozen layer."""
    bench: Any = importlib.import_module("bench_branches")
    peers: Any = importlib.import_module("branch_peers")
    most = bench.ROWS[0]
    cases = [("qkvo", most), ("gate-up", most), ("down", most), ("qkvo", 880), ("qkvo", 64)]
    near = ("cnext-cuda", "cnext-triton", "released", "peft-rank-32") if recorder.gpu else ("cnext", "released")
    every = (*near, "lorafusion", "concatenated", "unsloth", "peft-4")
    for shape, rows in cases if recorder.gpu else cases[-1:]:
        for dropout in (0.05, 0.0):
            for peer in names or (every if rows == most else near):
                if peer in peers.peers(dropout):
                    with recorder.attempt(f"{peer} {shape} {rows} {dropout}"):
                        branch(recorder, bench, peers, peer, bench.SHAPES[shape], rows, dropout)
                    if recorder.gpu:
                        torch.cuda.empty_cache()
    if not names:
        seven(recorder, bench)


def seven(recorder: Recorder, bench: Any) -> None:
    """The seven linear layers of a decoder layer; those that share an input in one call where the peer supports it."""
    rows = bench.ROWS[0] if recorder.gpu else bench.ROWS[-1]
    for dropout in (0.05, 0.0):
        for peer in (*bench.SEVEN, *(("cnext-cuda", "cnext-triton") if recorder.gpu else ())):
            if dropout and peer == "unsloth":
                continue
            with recorder.attempt(f"seven, {peer} {dropout}"):
                both, frozen, kept = bench.seven(peer, dropout, rows)
                found = recorder.race({"mine": both, "frozen": frozen}, 12)
                ratio = found["mine"]["ms"] / found["frozen"]["ms"]
                memory = {"kept_bytes": kept(), "peak_bytes": timing.peak_bytes(both)}
                memory["peak_bytes_frozen"] = timing.peak_bytes(frozen)
                where = {"shape": "seven linears", "rows": rows, "dropout": dropout}
                recorder.put(name=peer, **where, ratio=ratio, **memory, **found)
                del both, frozen, kept
            if recorder.gpu:
                torch.cuda.empty_cache()


def branch(
    recorder: Recorder, bench: Any, peers: Any, peer: str, shape: tuple[int, int], rows: int, dropout: float
) -> None:
    made, (x, grad) = bench.layer(shape, dropout), bench.inputs(rows, shape)
    module = peers.PEERS[peer](made).train()
    live = [x, *(p for p in module.parameters() if p.requires_grad)]

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(module(x), live, grad)

    def frozen() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(made.base(x), [x], grad)

    peers.check(module, x, grad, live[1:], bench.exact(made, x) if rows <= 880 and not dropout else None)
    found = recorder.race({"mine": both, "frozen": frozen}, 12)
    mine, base = found["mine"], found["frozen"]
    recorder.put(
        name=peer,
        shape=shape,
        rows=rows,
        dropout=dropout,
        ratio=mine["ms"] / base["ms"],
        mine=mine,
        frozen=base,
        frozen_tflops=4 * rows * shape[0] * shape[1] / base["ms"] / 1e9,
        x_bytes=x.nbytes,
        kept_bytes=peers.kept_bytes(module, x, module),
        peak_bytes=timing.peak_bytes(both),
        path=ops.last_path("lora_branches_backward") if peer.startswith("cnext") else "torch",
    )


def layer(recorder: Recorder) -> None:
    """A decoder layer of LLaMA2-13B with its seven linear layers, with and without activation checkpointing."""
    bench: Any = importlib.import_module("bench_decoder_layer")
    from torch.utils.checkpoint import checkpoint

    for dropout in (0.05, 0.0) if recorder.gpu else (0.05,):
        for again in (False, True) if recorder.gpu else (True,):
            shape = bench.SEQUENCES, bench.TOKENS, bench.NARROW
            x, grad = (torch.randn(shape, device=recorder.device).to(bench.DTYPE) for _ in range(2))
            x.requires_grad_()
            _, frozen = bench.decoder("frozen", 0.0)

            def both(function: Any, live: Any, x: Any = x, grad: Any = grad, again: bool = again) -> Any:
                y = checkpoint(function, x, use_reentrant=False) if again else function(x)
                return torch.autograd.grad(y, live, grad)

            for peer in ("mage", "cnext", "released", "peft-rank-32", "lorafusion"):
                with recorder.attempt(f"{peer} {dropout} {again}"):
                    module, forward = bench.decoder(peer, dropout)
                    live = [x, *(p for p in module.parameters() if p.requires_grad)]
                    assert all(bool(found.any()) for found in both(forward, live)), "a gradient is zero"

                    def mine(forward: Any = forward, live: Any = live, both: Any = both) -> Any:
                        return both(forward, live)

                    def base(frozen: Any = frozen, x: Any = x, both: Any = both) -> Any:
                        return both(frozen, [x])

                    found = recorder.race({"mine": mine, "frozen": base}, 8, graph=False)
                    ratio = found["mine"]["ms"] / found["frozen"]["ms"]
                    peak = timing.peak_bytes(mine)
                    recorder.put(name=peer, dropout=dropout, checkpointed=again, ratio=ratio, peak_bytes=peak, **found)
                    del module, forward, live, mine
                if recorder.gpu:
                    torch.cuda.empty_cache()


def profile(recorder: Recorder) -> None:
    """Profile: names, launches and microseconds per call of the kernels that take the most time."""
    bench: Any = importlib.import_module("bench_branches")
    peers: Any = importlib.import_module("branch_peers")
    rules: Any = importlib.import_module("bench_averaging")

    def table(name: str, call: Callable[[], object]) -> None:
        rows = [(key[:90], times, round(taken, 1)) for key, times, taken in timing.kernels(call)[:16]]
        recorder.put(name=name, kernels_launches_microseconds=rows)

    for dropout in (0.05, 0.0):
        for peer in ("cnext-cuda", "cnext-triton") if recorder.gpu else ("cnext",):
            if peer in peers.peers(dropout):
                with recorder.attempt(f"{peer}, dropout {dropout}"):
                    shape, rows = bench.SHAPES["qkvo"], bench.ROWS[0 if recorder.gpu else -1]
                    made, (x, grad) = bench.layer(shape, dropout), bench.inputs(rows, shape)
                    module = peers.PEERS[peer](made).train()
                    live = [x, *(p for p in module.parameters() if p.requires_grad)]
                    call = lambda: torch.autograd.grad(module(x), live, grad)  # noqa: B023, E731
                    table(f"{peer}, dropout {dropout}", call)
    for impl in recorder.impls:
        with recorder.attempt(f"pema_step, {impl}"):
            step = ops.prepare("pema_step_", *rules.filled(1e-2, 1e-3, -1e-3, 1e-2), impl=impl)
            table(f"pema_step, {impl}", lambda: step(rules.LEVEL))  # noqa: B023


def compiled(recorder: Recorder) -> None:
    """torch.compile's branches, which take minutes to compile."""
    branches(recorder, ("compiled",))
