"""Emu3 against transformers' own generation, images of any aspect ratio, and another vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from backbones import stock
from backbones.small_folders import CODES, write_emu3
from PIL import Image

from cnext.backbones.conversation import IGNORED, IMAGE_READ
from cnext.backbones.emu3 import Emu3Backbone
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emu3(tmp_path_factory.mktemp("weights") / "emu3")


@pytest.fixture
def emu3(folder: Path) -> Emu3Backbone:
    return Emu3Backbone.load("cpu", folder)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    noise = torch.randint(0, 256, (20, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def test_codes_equal_those_of_transformers(emu3: Emu3Backbone) -> None:
    """Greedy, with the row ends enforced, and guidance against a picture that nothing was asked of."""
    item = emu3.prepare(Sample("", (Turn("two blue stars"),))).question.with_answer(emu3.begin_image)
    codes = emu3.generate_codes([item])[0]
    start, visual = len(item), list(range(emu3.first_code, emu3.first_code + CODES))

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        # The first call of a run that guides is with the ids of the unguided half as well.
        return [emu3.row_end] if (len(ids) - start + 1) % 5 == 0 else visual

    blank = torch.tensor([[emu3.bos_id, *emu3.begin_image]])
    found = emu3.model.generate(
        input_ids=item.ids[None],
        attention_mask=torch.ones_like(item.ids[None]),
        max_new_tokens=19,
        do_sample=False,
        guidance_scale=emu3.guidance,
        negative_prompt_ids=blank,
        negative_prompt_attention_mask=torch.ones_like(blank),
        prefix_allowed_tokens_fn=allowed,
    )[0, start:]
    assert found.tolist() == stock.tokens(emu3, with_row_ends(codes.tolist()))[:-1]
    assert len(codes.unique()) > 2


def with_row_ends(codes: list[int]) -> list[int]:
    return [code for start in range(0, 16, 4) for code in [*codes[start : start + 4], stock.ROW_END]]


def test_logits_equal_those_of_transformers(emu3: Emu3Backbone, wide: Path) -> None:
    """All logits of an edit equal the stock forward pass, which embeds the picture read itself."""
    sample = Sample("", (Turn("make it blue"),), wide, wide)
    item = emu3.encode([sample])[0]
    found = emu3.output([item])
    ids = torch.tensor([stock.prompt(emu3, sample) + item.ids[len(item.question) :].tolist()])
    pixels = stock.pixels(emu3, wide)
    with torch.no_grad():
        hidden = emu3.model.model(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([pixels.shape[-2:]]))[0]
        expected = emu3.model.lm_head(hidden)[0, :-1]
    codes = slice(emu3.first_code, emu3.first_code + CODES)
    torch.testing.assert_close(found.logits, expected[item.labels[1:] != IGNORED], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.image_pred[0], expected[item.codes[1:] != IGNORED, codes], rtol=1e-4, atol=1e-4)


def test_structure_is_supervised_as_text(emu3: Emu3Backbone, wide: Path) -> None:
    item = emu3.encode([Sample("", (Turn("draw"),), target_image=wide)])[0]
    text = emu3.tokenizer.decode(item.labels[item.labels != IGNORED])
    rows = "<|extra_200|>" * 4
    assert text == f"<|image start|>4*4<|image token|>{rows}<|extra_201|><|image end|></s>"
    assert int((item.codes != IGNORED).sum()) == 16
    assert not ((item.codes != IGNORED) & (item.labels != IGNORED)).any()


def test_an_image_read_keeps_its_aspect_ratio(emu3: Emu3Backbone, wide: Path) -> None:
    """20 x 50 pixels become 24 x 56, about as many as min_pixels: 3 rows of 7 codes, each row with its end."""
    item = emu3.encode([Sample("", (Turn("what?", "red"),), wide)])[0]
    seen = item.ids[item.positions == IMAGE_READ].view(3, 8)
    rows, columns = (size // 8 for size in stock.pixels(emu3, wide).shape[-2:])
    assert (rows, columns) == (3, 7)
    assert (seen[:, -1] == emu3.row_end).all()
    assert ((seen[:, :-1] >= emu3.first_code) & (seen[:, :-1] < emu3.first_code + CODES)).all()
    assert emu3.tokenizer.decode(item.ids).count(f"<|image start|>{rows}*{columns}<|image token|>") == 1
    assert item.read is None


def test_no_code_is_written_as_text(emu3: Emu3Backbone, wide: Path) -> None:
    with torch.no_grad():
        emu3.model.lm_head.weight[emu3.first_code :] *= 100
    answer = emu3.generate([Sample("", (Turn("what?"),), wide)], 5)[0]
    assert "visual" not in emu3.tokenizer.decode(emu3.text_ids(answer.text))
    assert answer.image is None


def test_an_extreme_aspect_ratio_is_named(emu3: Emu3Backbone, tmp_path: Path) -> None:
    Image.new("RGB", (402, 2)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=r"line.png cannot be resized for emu3: .*aspect ratio"):
        emu3.prepare(Sample("", (Turn("what?", "red"),), tmp_path / "line.png"))


def test_another_vocabulary_is_named(folder: Path, tmp_path: Path) -> None:
    message = "does not have <.extra_200.> and the 32 visual tokens where the tokenizer has"
    for number, name in enumerate(("<|visual token 000003|>", "<|extra_200|>")):
        copy = shutil.copytree(folder, tmp_path / str(number))
        config = json.loads((copy / "config.json").read_text())
        config["vocabulary_map"][name] = 5
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            Emu3Backbone.load("cpu", copy)
    pixels = json.loads((folder / "preprocessor_config.json").read_text()) | {"spatial_factor": 4}
    (copy / "preprocessor_config.json").write_text(json.dumps(pixels))
    with pytest.raises(UserError, match=r"spatial_factor 4, the VQ model of config\.json has 8"):
        Emu3Backbone.load("cpu", copy)
