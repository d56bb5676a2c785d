"""The weights of a merged model in place of those of every backbone, with branches attached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones import small_vlms
from backbones.seed_x.released import write_released
from backbones.small_folders import write_emu3, write_janus
from safetensors.torch import save_file
from torch import nn

from cnext import adapters, backbones, methods
from cnext.adapters.exchange import without_branches
from cnext.backbones.base import Backbone, outer_model
from cnext.errors import UserError
from cnext.training import merged_model

WRITERS: dict[str, tuple[str, Callable[[Path], Path] | None]] = {
    "tiny": ("tiny", None),
    "seed-x": ("seed-x", write_released),
    "janus": ("janus", write_janus),
    "emu3": ("emu3", write_emu3),
    "qwen2-vl": ("hf", small_vlms.write_qwen2_vl),
    "llava": ("hf", small_vlms.write_llava),
    "gpt2": ("hf", small_vlms.write_gpt2),
}


def random_values(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in parameters.items()}


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_every_weight_is_replaced(name: str, write: Callable[[Path], Path] | None, tmp_path: Path) -> None:
    """Of the transformers model all, tied ones once; branches stay. The folder is as transformers saves it."""
    kind, weights = backbones.load(name), write and write(tmp_path / "weights")
    other: Backbone = kind.load("cpu", weights)
    inner: nn.Module = outer_model(other)
    values = random_values(dict(inner.named_parameters()))
    with torch.no_grad():
        for key, parameter in inner.named_parameters():
            parameter.copy_(values[key])
    inner.save_pretrained(tmp_path / "merged")
    inside = {id(parameter) for parameter in inner.parameters()}
    outside = {} if name == "hf" else {n: p for n, p in other.connections().items() if id(p) not in inside}
    beside = random_values(outside)
    if beside:
        save_file(beside, tmp_path / "merged" / "connection_layers.safetensors")

    backbone: Backbone = kind.load("cpu", weights)
    method = methods.load("lora")()
    method.setup(backbone, [], torch.Generator().manual_seed(0))
    branches = {key: tensor.clone() for key, tensor in method.adapter_parameters().items()}
    assert merged_model.check(tmp_path / "merged", backbone) == []
    before = {key: parameter.clone() for key, parameter in backbone.named_parameters()}
    merged_model.put(tmp_path / "merged", backbone)
    model = outer_model(backbone)
    with without_branches(model):
        found = dict(model.named_parameters())
        assert found.keys() == values.keys()
        assert all(torch.equal(found[key], value) for key, value in values.items())
        state, expected = model.state_dict(), inner.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert all(torch.equal(tensor, branches[key]) for key, tensor in method.adapter_parameters().items())
    own = dict(backbone.named_parameters())
    assert all(torch.equal(own[key], value) for key, value in beside.items())
    kept = {id(p) for p in [*model.parameters(), *(own[key] for key in beside)]}
    assert all(torch.equal(before[key], parameter) for key, parameter in own.items() if id(parameter) not in kept)
    assert adapters.layers(model)


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    backbone = backbones.load("tiny").load()
    outer_model(backbone).save_pretrained(tmp_path)
    backbone.decoder.model.norm.to("meta")
    with pytest.raises(UserError, match=r"model\.norm\.weight are offloaded and cannot be replaced; leave"):
        merged_model.check(tmp_path, backbone)
