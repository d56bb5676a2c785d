"""The full-size model on the meta device: every published shape and count, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from backbones.seed_x.released import agent_shapes, llm_shapes, prompt_shapes, vision_shapes
from torch import Tensor, nn

from cnext import adapters
from cnext.backbones.seed_x import placing
from cnext.backbones.seed_x.model import SeedX
from cnext.backbones.seed_x.prompt_resampler import PromptResampler, PromptSizes
from cnext.errors import UserError

GIB = 2**30


@pytest.fixture(scope="module")
def full() -> SeedX:
    return SeedX.meta()


def count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_shapes(full: SeedX) -> None:
    assert shapes(full.llm) == llm_shapes(32330, 5120, 13824, 40)
    assert shapes(full.vit) == vision_shapes(1664, 48, 8192, 14, 256, 256, 4096)
    agent = {name: shape for name, shape in shapes(full).items() if not name.startswith(("llm.", "vit."))}
    assert agent == agent_shapes(5120, 4096)
    assert 4 * sum(map(math.prod, agent.values())) == 860_733_440, "bytes of the published agent file"
    with torch.device("meta"):
        assert shapes(PromptResampler(PromptSizes())) == prompt_shapes(1024, 1024, 4, 4096, 768, 1280)
    assert full.llm.config.num_attention_heads == full.llm.config.num_key_value_heads == 40
    assert full.llm.config._attn_implementation == "sdpa"


def test_counts_of_what_is_trained(full: SeedX) -> None:
    connections, extras = full.connections(), full.released_extras()
    assert count(connections.values()) == 126_197_760 + 88_375_296 + 20_480
    assert count(extras.values()) == 2 * 165_529_600 + 414_720
    assert not connections.keys() & extras.keys()
    roles = {role.name: 8 for role in adapters.BRANCH_ROLES}
    model = adapters.attach(SeedX.meta().language_model, SeedX.targets, roles)
    for role in roles:
        parts = adapters.branch_parameters(model, [role])
        assert len(parts) == 2 * 280
        assert count(tensor for name, tensor in parts.items() if name.endswith(".A")) == 14_254_080
        assert count(tensor for name, tensor in parts.items() if name.endswith(".B")) == 17_039_360
    branches = adapters.branch_parameters(model)
    assert count(branches.values()) == 125_173_760
    trained = count([*branches.values(), *connections.values(), *extras.values()])
    # Beside these the released code has routers that mage does not use, and an unused second copy of every norm.
    routers = 4 * sum(layer.base.in_features for layer in adapters.layers(model).values())
    assert routers == 7_127_040
    assert trained + routers + 414_720 == 678_782_976


def test_a_device_map_distributes_whole_layers(full: SeedX) -> None:
    model = full.llm.model
    placed = placing.plan(model, "balanced", torch.bfloat16, {0: 40 * GIB, 1: 40 * GIB, "cpu": 100 * GIB})
    layers = [
        placing.device_of(f"layers.{number}.mlp.up_proj.weight", placed, torch.device("cpu")) for number in range(40)
    ]
    assert all(f"layers.{number}" in placed for number in range(40)), "no layer is split"
    assert {str(device) for device in layers} == {"cuda:0", "cuda:1"}
    assert 15 <= layers.index(torch.device("cuda:1")) <= 25
    with pytest.raises(UserError, match="to fit on 1 accelerators"):
        placing.plan(model, "auto", torch.bfloat16, {0: 12 * GIB, "cpu": 100 * GIB})
    with pytest.raises(UserError, match="valid: auto, balanced"):
        placing.plan(model, "even", torch.bfloat16)
