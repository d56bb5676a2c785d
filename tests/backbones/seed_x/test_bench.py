"""The benchmark of the full-size SEED-X, at a small size; what it constructs has the published size."""

from __future__ import annotations

import math

import pytest
import seed_x
import torch

from cnext.backbones.seed_x.tokenizer import ADDED

# diffusers turns a tensor into an array in a way that numpy 2 announces to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_learns_and_answers_at_a_small_size() -> None:
    found = seed_x.bench(seed_x.SMALL, torch.device("cpu"), steps=2, batch=2, micro=1, tokens=4, denoising=2)
    for task in seed_x.TASKS:
        row = found["training"][task]
        assert len(row["losses"]) == row["steps"] == 2
        assert all(map(math.isfinite, row["losses"]))
        assert row["positions_per_second"] > row["supervised_tokens_per_second"] > 0
    assert found["answering"]["text"]["answers"] == 2
    assert found["answering"]["image"]["shape"] == [16, 16, 3]


def test_has_the_published_sizes() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**seed_x.BASE_UNET, **seed_x.FULL.unet), AutoencoderKL(**seed_x.FULL.vae)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    tokenizer, words = seed_x.tokenizer(seed_x.FULL.llm["vocab_size"] - len(ADDED))
    assert len(tokenizer) == 32330
    ids = tokenizer.encode(" ".join(words[:5]))
    assert len(ids) == 5
    assert tokenizer.decode(ids) == " ".join(words[:5])
