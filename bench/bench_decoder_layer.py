"""Benchmark of a decoder layer with branches: ``pytest bench/ --benchmark-only -k decoder_layer``.

One layer of LLaMA2-13B in bfloat16, 14,080 tokens in 16 sequences; on a CPU a quarter as wide, float32, 256 tokens, one
thread. A row's ``time_over_baseline`` is the median ratio of forward and backward to those of the frozen layer, in
pairs, both checkpointed where the row is. ``kept_bytes`` is what the graph saves besides parameters, without
checkpointing, ``peak_bytes`` the peak allocation of a call, ``state_bytes`` the branches' parameters. "mage" is the
result of `cnext.attach_mage`, with q, k and v, and gate and up, computed together; "cnext" each layer alone.
"""

from __future__ import annotations

from collections.abc import Callable

import bench_branches
import pytest
import torch
from branch_peers import DTYPE, NARROW, PEERS, WIDE, adapted, kept_bytes, ops_run
from timing import DEVICE, GPU, SMALL, peak_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnext
from cnext import ops
from cnext.ops import dispatch

pytestmark = pytest.mark.usefixtures("one_thread")
SEQUENCES, TOKENS = (16, 880) if GPU else (2, 16) if SMALL else (2, 128)
LINEARS = 7
RIVALS = ("mage", "cnext", "released", "peft-rank-32", "peft-4", "lorafusion", "unsloth")


def decoder(peer: str, dropout: float) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The layer, its linear layers replaced unless ``peer`` is "frozen", and its forward pass."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=NARROW, intermediate_size=WIDE, num_attention_heads=NARROW // 128, attn_implementation="sdpa"
    )
    place = torch.arange(TOKENS, device=DEVICE)[None]
    with torch.device(DEVICE):
        layer = LlamaDecoderLayer(config, 0).requires_grad_(False).to(DTYPE)
        angles = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=DTYPE), place)
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == LINEARS
    if peer == "mage":
        handle = cnext.attach_mage(layer, language_model=layer, dropout=dropout)
        layer.to(DEVICE, DTYPE)
        for made in handle.layers.values():
            for branch in made.branches.values():
                nn.init.normal_(branch.B, std=0.02)
        handle.train_on(("text", "image"), ("text",))
    for name, linear in linears if peer not in ("frozen", "mage") else ():
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, PEERS[peer](adapted(linear, dropout).to(DEVICE, DTYPE)))

    def forward(x: Tensor) -> Tensor:
        y = layer(x, position_ids=place, position_embeddings=angles)
        return y[0] if isinstance(y, tuple) else y

    return layer.train(), forward


def near(mine: Tensor, other: Tensor) -> bool:
    return bool((mine - other).norm() <= (2e-2 if GPU else 1e-5) * other.norm())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("peer", "dropout"), [(g, p) for p in (0.0, 0.05) for g in RIVALS if not p or g != "unsloth"])
def test_branches_decoder_layer(race, peer, dropout, checkpointed):
    race.benchmark.group = f"branches decoder layer, {'checkpointed' if checkpointed else 'plain'}, dropout {dropout}"
    (layer, forward), (base, frozen) = decoder(peer, dropout), decoder("frozen", 0.0)
    x, grad = (torch.randn(SEQUENCES, TOKENS, NARROW, device=DEVICE).to(DTYPE) for _ in range(2))
    x.requires_grad_()
    live = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both(function: Callable[[Tensor], Tensor], inputs: list[Tensor], again: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        y = checkpoint(function, x, use_reentrant=False) if again else function(x)
        return torch.autograd.grad(y, inputs, grad)

    for mine, plain in zip(both(forward, live, checkpointed), both(forward, live, False), strict=True):
        assert near(mine, plain), "a checkpoint does not repeat the mask"
        assert bool(mine.any()), "a gradient is zero"
    if not dropout and peer != "mage":
        expected = decoder("concatenated", 0.0)[1]
        assert near(forward(x), expected(x))
        assert near(both(forward, [x], checkpointed)[0], both(expected, [x], False)[0])

    def with_branches() -> tuple[Tensor, ...]:
        return both(forward, live, checkpointed)

    extra: dict[str, object] = {"x_bytes": x.nbytes, "state_bytes": sum(p.nbytes for p in layer.parameters())}
    extra["state_bytes_frozen"] = sum(p.nbytes for p in base.parameters())
    extra["peak_bytes"] = peak_bytes(with_branches)
    extra["peak_bytes_frozen"] = peak_bytes(lambda: both(frozen, [x], checkpointed))
    if not checkpointed:
        extra["kept_bytes"] = kept_bytes(forward, x, layer)
        extra["kept_bytes_frozen"] = kept_bytes(frozen, x, base)
    if peer in ("mage", "cnext"):
        calls = LINEARS if peer == "cnext" else len(bench_branches.GROUPS)
        assert ops_run(with_branches) == {"lora_branches": calls * (1 + checkpointed), "lora_branches_backward": calls}
        extra["path"] = ops.last_path("lora_branches_backward")
        expected = dispatch.choose("lora_branches", DEVICE, None, rows=SEQUENCES * TOKENS)
        assert extra["path"] == expected or not (dropout or GPU)
    race.run(with_branches, lambda: both(frozen, [x], checkpointed), rounds=20 if GPU else 7, **extra)
