"""A file with the keys of the authors' released ones is the state that a run of SEED-X starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnext import methods
from cnext.adapters import exchange_authors
from cnext.backbones.base import outer_model
from cnext.backbones.seed_x.model import SeedX
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.exchange.evaluation import configuration
from cnext.exchange.export import _by_kind
from cnext.methods.base import Method
from cnext.tasks import suites
from cnext.training import initial
from cnext.training.setup import trained_beside

SUITE = suites.load("continual-next")


def attached(folder: Path, name: str, **hyperparameters: float) -> tuple[SeedX, Method]:
    model, method = SeedX.load(weights=folder, steps=2), methods.load(name)(**hyperparameters)
    method.setup(model, SUITE.tasks, torch.Generator().manual_seed(0))
    return model, method


@pytest.mark.parametrize("method", ["mage", "moelora"])
def test_a_released_file_is_taken_over_whole(method: str, folder: Path, tmp_path: Path) -> None:
    """Branches in both spellings, routers, resamplers, position embeddings, embeddings, head and norms."""
    model, made = attached(folder, method, scale=1.0)
    beside = trained_beside(model, "released")
    expected = made.adapter_parameters() | beside
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in expected.values():
            parameter.copy_(torch.randn(parameter.shape).bfloat16())
    state = exchange_authors.to_released(outer_model(model), _by_kind(outer_model(model), beside))
    again = {n.replace(".weight", ".mlp.weight"): tensor for n, tensor in state.items() if ".loraB." in n}
    kept = {n.replace("modules_to_save.default", "original_module"): t for n, t in state.items() if "to_save" in n}
    router = {"llm.base_model.model.model.layers.0.self_attn.q_proj.lora_router.default.weight": torch.ones(4, 8)}
    state = {f"module.{name}": t.bfloat16() for name, t in (state | again | kept).items()}
    torch.save(state | (router if method == "mage" else {}), tmp_path / "pytorch_model.bin")

    options = {"backbone": "seed-x", "weights": folder, "suite": SUITE.name, "data": tmp_path, "device": "cpu"}
    shared = {"method": method, "hyperparameters": {"scale": 1.0}, "init_from": tmp_path, "init_tasks": ("VQAv2",)}
    planned = plan(RunConfig(**options, **shared, preset="released", precision="float32"))
    model, made = attached(folder, method, scale=1.0)
    held = made.adapter_parameters() | trained_beside(model, "released")
    found = initial.read(planned, model, made, held)
    assert found is not None
    found.put(held, made)
    assert found.tensors.keys() == expected.keys() == held.keys()
    assert all(torch.equal(held[name], parameter) for name, parameter in expected.items())

    less = plan(RunConfig(**options, **shared, preset="paper"))
    held = made.adapter_parameters() | trained_beside(model, "connections")
    with pytest.raises(UserError, match=r"does not train \(connections\): .*give --trainable connections or released"):
        initial.read(less, model, made, held)

    config = configuration(tmp_path, method=method, **options)
    assert config.trainable == "released"
    assert config.init_tasks == ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")
    assert plan(config).hyperparameters["scale"] == 1.0
