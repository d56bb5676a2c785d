"""Folders of weights with a configuration of another model, or with numbers that are none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.small_folders import WRITERS
from backbones.small_vlms import write_llama
from torch import nn

from cnext import backbones
from cnext.errors import UserError
from cnext.training.setup import require_finite

FOLDERS: dict[str, Callable[[Path], Path]] = {"hf": write_llama, "janus": WRITERS["janus"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name) / "weights") for name, write in FOLDERS.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**33}, r"it is of a model of [0-9,]{14,} parameters, and the weights have [0-9,]+ bytes"),
        ({"vocab_size": 10**13}, r"it is of a model of [0-9,]{14,} parameters"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1,000,000,000"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("backbone", FOLDERS)
def test_a_larger_model_is_refused_before_memory_is_taken(
    backbone: str, changes: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    path = folders[backbone] / "config.json"
    before = path.read_text()
    values = json.loads(before)
    (values if backbone == "hf" else values["text_config"]).update(changes)
    path.write_text(json.dumps(values))
    try:
        with pytest.raises(UserError, match=rf"config.json does not fit the weights: {message}.*copy both again"):
            backbones.load(backbone).load("cpu", folders[backbone])
    finally:
        path.write_text(before)


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(3e38)  # whose sum is out of float32's range
        model[1].bias.copy_(torch.tensor([1e30, -1e30]))
    require_finite(model, Path("folder"))
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model[1].weight[0, 1] = value
        with pytest.raises(UserError, match=r"^folder: 1 of 4 numbers of 1.weight are infinite or no number; copy"):
            require_finite(model, Path("folder"))
