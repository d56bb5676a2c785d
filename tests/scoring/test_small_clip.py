"""The small CLIP in plain torch is open_clip's of the same configuration, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from cnext.errors import UserError
from cnext.scoring.clip import MODEL_FILE, TINY_CLIP, VOCABULARY_FILE, WEIGHTS_FILE, load_clip, needs_open_clip
from cnext.scoring.small_clip import SmallClip, transform

CONFIG = json.loads((TINY_CLIP / MODEL_FILE).read_text())
SIZES = [(48, 48), (50, 70), (33, 90), (300, 201), (49, 48), (48, 51)]


@pytest.fixture(scope="module")
def theirs() -> tuple[torch.nn.Module, object]:
    open_clip.add_model_config(TINY_CLIP / MODEL_FILE)
    text, half = CONFIG["text_cfg"] | {"vocab_size": 29}, (0.5, 0.5, 0.5)
    torch.manual_seed(0)
    kept = {"image_mean": half, "image_std": half, "load_weights": False}
    model, _, prepare = open_clip.create_model_and_transforms(Path(MODEL_FILE).stem, text_cfg=text, **kept)
    return model.eval(), prepare


def test_initial_values_and_embeddings_are_those_of_open_clip(theirs: tuple[torch.nn.Module, object]) -> None:
    torch.manual_seed(0)
    ours = SmallClip(CONFIG, 29).eval()
    expected = theirs[0].state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    images, ids = torch.randn(3, 3, 48, 48), torch.randint(0, 28, (4, 32))
    ids[:, [5, 31, 9, 0]] = 28
    with torch.no_grad():
        assert torch.equal(ours.encode_image(images), theirs[0].encode_image(images))
        assert torch.equal(ours.encode_text(ids), theirs[0].encode_text(ids))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_images_are_prepared_as_open_clip_does(theirs: tuple[torch.nn.Module, object], mode: str) -> None:
    random = np.random.default_rng(0)
    for width, height in SIZES:
        pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        assert torch.equal(transform(48)(image), theirs[1](image)), (width, height)


def test_a_damaged_small_clip_is_refused(tmp_path: Path) -> None:
    for name in (MODEL_FILE, VOCABULARY_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((TINY_CLIP / name).read_bytes())
    assert not needs_open_clip(str(tmp_path))
    wide = CONFIG | {"embed_dim": 32}
    (tmp_path / MODEL_FILE).write_text(json.dumps(wide))
    with pytest.raises(
        UserError, match=r"weights\.safetensors: expected the weights of the CLIP in model\.json beside"
    ):
        load_clip(str(tmp_path), "cpu")
    (tmp_path / MODEL_FILE).write_text('{"embed_dim": 32}')
    with pytest.raises(UserError, match=r"model\.json: expected open_clip's configuration of a small CLIP.*text_cfg"):
        load_clip(str(tmp_path), "cpu")
