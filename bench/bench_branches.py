"""Linear layers with branches: ``pytest bench/ --benchmark-only -k branches``. CNEXT_TEST_DEVICE=cuda runs it on a GPU.

Four branches of rank 8, three of them live, on LLaMA2-13B's three shapes in bfloat16; on a CPU the shapes are a
quarter as wide and float32, and one thread works. Every candidate is checked before it is timed. A row's
``time_over_yardstick`` is the median ratio of its time to that of the frozen linear layer (forward, and dX), in pairs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext import adapters, ops
from cnext.adapters import AdapterLinear, Branch

DEVICE = os.environ.get("CNEXT_TEST_DEVICE", "cpu")
GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
NARROW, WIDE = (5120, 13824) if GPU else (1280, 3456)
SHAPES = {"qkvo": (NARROW, NARROW), "gate-up": (NARROW, WIDE), "down": (WIDE, NARROW)}
ROWS = (14080, 880, 64) if GPU else (880, 64)
RANK, LIVE, BRANCHES = 8, 3, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layer(shape: tuple[int, int], dropout: float) -> AdapterLinear:
    """An adapter layer whose last branch is frozen."""
    torch.manual_seed(0)
    inner, outer = shape
    base = nn.Linear(inner, outer, bias=False)
    made = AdapterLinear(
        base, {str(i): Branch(torch.randn(RANK, inner) * inner**-0.5, outer) for i in range(BRANCHES)}, dropout=dropout
    )
    for branch in made.branches.values():
        nn.init.normal_(branch.B, std=0.1)
    made.branches[str(BRANCHES - 1)].requires_grad_(False)
    return made.to(DEVICE, DTYPE)


def released(made: AdapterLinear, x: Tensor) -> Tensor:
    """The released loop: a mask, a scaling and a routing weight of 1 for every branch, one after another."""
    y = made.base(x)
    for branch in made.branches.values():
        dropped = F.dropout(x, made.dropout) if made.dropout else x
        y = y + F.linear(F.linear(dropped, branch.A), branch.B) * 1.0 * 1.0
    return y


def concatenated(made: AdapterLinear, x: Tensor) -> Tensor:
    """One LoRA of the branches' concatenation, as eager torch has it."""
    a = torch.cat([branch.A for branch in made.branches.values()])
    b = torch.cat([branch.B for branch in made.branches.values()], 1)
    dropped = F.dropout(x, made.dropout) if made.dropout else x
    return made.base(x) + F.linear(F.linear(dropped, a), b)


def peft(made: AdapterLinear, names: tuple[str, ...]) -> nn.Module:
    """The branches as PEFT's adapters, or all as one."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    rank = RANK * BRANCHES // len(names)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=made.dropout)
    theirs = LoraLinear(made.base, names[0], config=config, r=rank, lora_alpha=rank)
    for name in names[1:]:
        theirs.update_layer(name, rank, lora_alpha=rank, config=config)
    theirs.set_adapter(list(names))
    parts = list(made.branches.values())
    with torch.no_grad():
        for i, name in enumerate(names):
            mine = parts[i : i + 1] if len(names) > 1 else parts
            theirs.lora_A[name].weight = nn.Parameter(torch.cat([branch.A for branch in mine]))
            theirs.lora_B[name].weight = nn.Parameter(torch.cat([branch.B for branch in mine], 1))
    if len(names) > 1:
        theirs.lora_A[names[-1]].requires_grad_(False)
        theirs.lora_B[names[-1]].requires_grad_(False)
    return theirs.train().to(DEVICE)


def candidates(made: AdapterLinear) -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]]:
    """Every way to compute the layer, and the module whose live parameters it trains."""
    four, one = peft(made, ("0", "1", "2", "3")), peft(made, ("all",))
    compiled = torch.compile(lambda x: concatenated(made, x))
    return {
        "cnext": (made, made),
        "released": (lambda x: released(made, x), made),
        "concatenated": (lambda x: concatenated(made, x), made),
        "compiled": (compiled, made),
        "peft-4": (four, four),
        "peft-rank-32": (one, one),
    }


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


CANDIDATES = ("cnext", "released", "concatenated", "compiled", "peft-4", "peft-rank-32")


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_branches(race, candidate, shape, rows, dropout, what):
    race.benchmark.group = f"branches {what}, {shape[0]} to {shape[1]}, {rows} rows, dropout {dropout}"
    made = layer(shape, dropout)
    x = torch.randn(rows, shape[0], device=DEVICE).to(DTYPE).requires_grad_()
    grad = torch.randn(rows, shape[1], device=DEVICE).to(DTYPE)
    function, module = candidates(made)[candidate]
    with torch.no_grad():
        made.eval(), module.eval()
        exact = concatenated(layer(shape, 0.0).double(), x.double())
        if not dropout:
            torch.testing.assert_close(
                function(x).double(), exact, rtol=2e-2 if GPU else 1e-4, atol=0.1 if GPU else 1e-4
            )
        made.train(), module.train()
    live = [x, *(p for p in module.parameters() if p.requires_grad)]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x)

    def frozen() -> Tensor:
        with torch.no_grad():
            return made.base(x)

    both = lambda: torch.autograd.grad(function(x), live, grad)  # noqa: E731
    frozen_both = lambda: torch.autograd.grad(made.base(x), [x], grad)  # noqa: E731
    kept = kept_bytes(function, x, module) if candidate != "compiled" else None
    pair = (forward, frozen) if what == "forward" else (both, frozen_both)
    race.run(*pair, rounds=20 if GPU else 9, kept_bytes=kept, x_bytes=x.nbytes)
    if candidate == "cnext":
        path = ops.last_path("lora_branches")
        assert path == ("cuda" if GPU else "cpp")
        race.benchmark.extra_info["path"] = path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_branches_merged(race, shape):
    """Merged, the layer is its base."""
    race.benchmark.group = "branches merged, 64 rows"
    made, x = layer(shape, 0.0), torch.randn(64, shape[0], device=DEVICE).to(DTYPE)
    made.merge()
    with torch.no_grad():
        race.run(lambda: made(x), lambda: made.base(x))


class Released(nn.Module):
    def __init__(self, made: AdapterLinear) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return released(self.made, x)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("peer", ["peft-lora", "released"])
def test_branches_train_step(race, peer, dropout, tmp_path: Path):
    """A whole training step of the tiny backbone: the peer's time over that of ``mage``."""
    from cnext.backbones.tiny.model import TinyBackbone
    from cnext.tasks import formats, suites, synthetic

    race.benchmark.group = f"branches, training step, dropout {dropout}"
    task = suites.load("next-tiny").task("VQAv2")
    samples = formats.read(task, synthetic.write_next_tiny(tmp_path / "data", 16, 1), "train")

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
                    setattr(tiny.get_submodule(parent), child, Released(made))
        optimizer = torch.optim.AdamW(live, fused=True)
        encoded = tiny.encode(samples)

        def run() -> None:
            tiny.loss(encoded).total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    race.run(step(peer), step("mage"), rounds=15)
