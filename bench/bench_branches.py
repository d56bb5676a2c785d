"""Benchmarks of linear layers with branches: ``pytest bench/ --benchmark-only -k branches``.

CNEXT_TEST_DEVICE=cuda runs them on a GPU.

LLaMA2-13B's three shapes in bfloat16; on a CPU the shapes are a quarter as wide and float32, and one thread works.
Every candidate is checked before it is timed. A row's ``time_over_baseline`` is the median ratio of its time to that
of the frozen linear layers (forward, and dX), in pairs; on a GPU both are CUDA graphs, save in the training step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import branch_peers
import pytest
import torch
from branch_peers import DTYPE, NARROW, PEERS, WIDE, adapted, check, kept_bytes, ops_run, peers
from timing import DEVICE, GPU, peak_bytes
from torch import Tensor, nn

from cnext import adapters, ops
from cnext.ops import dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # torch 2.11 warns about its own code
]
SHAPES = {"qkvo": (NARROW, NARROW), "gate-up": (NARROW, WIDE), "down": (WIDE, NARROW)}
ROWS = (14080, 880, 64) if GPU else (880, 64)
ROUNDS = 20 if GPU else 9
CASES = [(peer, p) for p in (0.0, 0.05) for peer in peers(p)]


def layer(shape: tuple[int, int], dropout: float, dtype: torch.dtype = DTYPE) -> adapters.AdapterLinear:
    torch.manual_seed(0)
    return adapted(nn.Linear(*shape, bias=False, device=DEVICE, dtype=dtype), dropout).to(DEVICE, dtype)


def inputs(rows: int, shape: tuple[int, int], dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """x and dY."""
    x, grad = (torch.randn(rows, width, device=DEVICE).to(dtype) for width in shape)
    return x.requires_grad_(), grad


def exact(made: adapters.AdapterLinear, x: Tensor) -> Tensor:
    """y without dropout, in float64."""
    with torch.no_grad():
        return nn.functional.linear(x.double(), made.base.weight.double()) + sum(
            x.double() @ branch.A.double().T @ branch.B.double().T for branch in made.branches.values()
        )


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("peer", "dropout"), CASES)
def test_branches(race, peer, dropout, shape, rows, what):
    race.benchmark.group = f"branches {what}, {shape[0]} to {shape[1]}, {rows} rows, dropout {dropout}"
    made, (x, grad) = layer(shape, dropout), inputs(rows, shape)
    module = PEERS[peer](made).train()
    live = [x, *(p for p in module.parameters() if p.requires_grad)]
    check(module, x, grad, live[1:], None if dropout else exact(made, x))

    def forward() -> Tensor:
        with torch.no_grad():
            return module(x)

    def frozen() -> Tensor:
        with torch.no_grad():
            return made.base(x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), live, grad)

    def frozen_both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(made.base(x), [x], grad)

    booked = {"x_bytes": x.nbytes, "kept_bytes": kept_bytes(module, x, module) if peer != "compiled" else None}
    if peer.startswith("cnext"):
        assert ops_run(both) == {"lora_branches": 1, "lora_branches_backward": 1}
        booked["path"] = ops.last_path("lora_branches_backward")
        asked = {"cnext-cuda": "cuda", "cnext-triton": "triton"}.get(peer)
        # On a CPU torch does it all where there is no dropout.
        assert booked["path"] == dispatch.choose("lora_branches", DEVICE, asked, rows=rows) or not (dropout or GPU)
    pair = (both, frozen_both) if what == "both" else (forward, frozen)
    race.run(*pair, rounds=ROUNDS, graph=GPU, **booked)


if not GPU:

    @pytest.mark.parametrize("peer", ["cnext", "released"])
    @pytest.mark.parametrize("dropout", [0.0, 0.05])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_branches_full_width(race, dtype, dropout, peer):
        """At 5120 wide the frozen products are most of the time: no code can win more over the released loop than the
        row of "released", which is that loop over the frozen layer alone."""
        shape, rows = (5120, 5120), 880
        race.benchmark.group = f"branches both, 5120 to 5120, {dtype}, {rows} rows, dropout {dropout}"
        made, (x, grad) = layer(shape, dropout, dtype), inputs(rows, shape, dtype)
        module = PEERS[peer](made).train()
        live = [x, *(p for p in module.parameters() if p.requires_grad)]
        check(module, x, grad, live[1:])
        pair = lambda: torch.autograd.grad(module(x), live, grad), lambda: torch.autograd.grad(made.base(x), [x], grad)
        race.run(*pair, rounds=5)


def apart_or_together(peer: str, made: nn.ModuleList) -> Callable[[Tensor], Sequence[Tensor]]:
    """How a peer computes layers that read the same x: one by one, or in one call."""
    layers: list[Any] = list(made)
    if peer == "unsloth":
        return lambda x: branch_peers.unsloth(layers, x)
    if peer == "cnext-grouped":
        return lambda x: branch_peers.together(layers, x)
    return lambda x: [one(x) for one in layers]


GROUPED = ("cnext", "cnext-grouped", "released", "peft-rank-32", "unsloth", "lorafusion")


@pytest.mark.parametrize(("peer", "dropout"), [(g, p) for p in (0.0, 0.05) for g in GROUPED if not p or g != "unsloth"])
def test_branches_qkv(race, peer, dropout):
    """Three layers that read the same x, forward and backward, which may share passes over x and dX."""
    shape, rows = (NARROW, NARROW), ROWS[0]
    race.benchmark.group = f"branches q, k and v, {NARROW} wide, {rows} rows, dropout {dropout}"
    layers, (x, grad) = [layer(shape, dropout) for _ in range(3)], inputs(rows, shape)
    made = nn.ModuleList([PEERS[peer.removesuffix("-grouped")](one) for one in layers]).train()
    run = apart_or_together(peer, made)
    live = [x, *(p for p in made.parameters() if p.requires_grad)]
    check(lambda x: torch.cat([*run(x)], -1), x, torch.cat([grad] * 3, -1), live[1:])

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x), live, [grad] * 3)

    def frozen() -> tuple[Tensor, ...]:
        return torch.autograd.grad([one.base(x) for one in layers], [x], [grad] * 3)

    if peer.startswith("cnext"):
        assert ops_run(both)["lora_branches"] == (1 if peer == "cnext-grouped" else 3)
    kept = kept_bytes(lambda x: torch.cat([*run(x)], -1), x, made)
    race.run(both, frozen, rounds=ROUNDS, graph=GPU, kept_bytes=kept, x_bytes=x.nbytes)


GROUPS = (("qkvo", 3), ("qkvo", 1), ("gate-up", 2), ("down", 1))
"""The seven linear layers of a decoder layer: q, k and v read one input, o another, gate and up, down."""


def seven(peer: str, dropout: float, rows: int) -> tuple[Callable[[], object], Callable[[], object], Callable[[], int]]:
    """Forward and backward of the seven layers by a peer and of the frozen ones, and the bytes that the graph saves."""
    peer = {"cnext": "cnext-grouped"}.get(peer, peer)
    alone = peer.removesuffix("-grouped").removesuffix("-alone")
    runs, frozen, live, xs, grads, owned = [], [], [], [], [], nn.ModuleList()
    for name, count in GROUPS:
        made = [layer(SHAPES[name], dropout) for _ in range(count)]
        x, grad = inputs(rows, SHAPES[name])
        modules = nn.ModuleList([PEERS[alone](one) for one in made]).train()
        run = apart_or_together(peer, modules)
        live += [p for p in modules.parameters() if p.requires_grad]
        mine = [p for p in modules.parameters() if p.requires_grad]
        check(lambda x, run=run: torch.cat([*run(x)], -1), x, torch.cat([grad] * count, -1), mine)
        runs.append((run, x))
        frozen.append(([one.base for one in made], x))
        xs.append(x)
        grads += [grad] * count
        owned.extend(modules)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad([y for run, x in runs for y in run(x)], [*xs, *live], grads)

    def frozen_both() -> tuple[Tensor, ...]:
        return torch.autograd.grad([base(x) for bases, x in frozen for base in bases], xs, grads)

    def kept() -> int:
        return sum(kept_bytes(lambda x, run=run: torch.cat([*run(x)], -1), x, owned) for run, x in runs)

    return both, frozen_both, kept


SEVEN = ("cnext", "cnext-alone", "released", "peft-rank-32", "peft-4", "lorafusion", "unsloth")


@pytest.mark.parametrize(("peer", "dropout"), [(g, p) for p in (0.0, 0.05) for g in SEVEN if not p or g != "unsloth"])
def test_branches_seven(race, peer, dropout):
    """All linear layers of a decoder layer; those that read one input are computed together where the peer can."""
    race.benchmark.group = f"branches of a decoder layer's seven linears, {ROWS[0]} rows, dropout {dropout}"
    both, frozen, kept = seven(peer, dropout, ROWS[0])
    row = {"kept_bytes": kept(), "peak_bytes": peak_bytes(both), "peak_bytes_frozen": peak_bytes(frozen)}
    race.run(both, frozen, rounds=ROUNDS, graph=GPU, **row)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_branches_merged(race, shape):
    """A merged layer costs what its base costs."""
    race.benchmark.group = "branches merged, 64 rows"
    made, (x, _) = layer(shape, 0.0), inputs(64, shape)
    made.merge()
    with torch.no_grad():
        race.run(lambda: made(x), lambda: made.base(x), graph=GPU)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("peer", ["peft-lora", "released"])
def test_branches_train_step(race, peer, dropout, tmp_path: Path):
    """A training step of the tiny backbone; the baseline is ``mage``."""
    from cnext.backbones.tiny.model import TinyBackbone
    from cnext.tasks import formats, suites, synthetic

    race.benchmark.group = f"branches, training step, eager, dropout {dropout}"
    task = suites.load("next-tiny").task("VQAv2")
    samples = formats.read_samples(task, synthetic.write_next_tiny(tmp_path / "data", 16, 1), "train")

    def step(kind: str) -> Callable[[], object]:
        tiny = TinyBackbone.load(DEVICE).train()
        if kind == "peft-lora":
            from peft import LoraConfig, inject_adapter_in_model

            config = LoraConfig(r=32, lora_alpha=32, lora_dropout=dropout, target_modules=list(tiny.targets))
            inject_adapter_in_model(config, tiny.language_model)
            live = [p for p in tiny.parameters() if p.requires_grad]
        else:
            handle = adapters.attach_mage(tiny, language_model=tiny.language_model, dropout=dropout)
            live = list(handle.train_on(task.reads, task.writes).values())
            if kind == "released":
                for name, made in handle.layers.items():
                    parent, _, child = name.rpartition(".")
                    setattr(tiny.get_submodule(parent), child, branch_peers.Released(made))
        optimizer = torch.optim.AdamW(live, fused=True)
        encoded = tiny.encode(samples)

        def run() -> None:
            tiny.loss(encoded).total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    race.run(step(peer), step("mage"), rounds=15)
