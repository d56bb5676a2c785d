"""Janus: against transformers' own image generation, its aligners' gradients, and folders that are not whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones import stock
from backbones.small_folders import write_emu3, write_janus
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from cnext.backbones.conversation import IMAGE_READ
from cnext.backbones.janus import JanusBackbone
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_janus(tmp_path_factory.mktemp("weights") / "janus")


@pytest.fixture
def janus(folder: Path) -> JanusBackbone:
    return JanusBackbone.load("cpu", folder)


def test_codes_equal_those_of_transformers(janus: JanusBackbone) -> None:
    """Greedy, two captions of different lengths, with the released guidance."""
    asked = [janus.prepare(Sample("", (Turn(text),))).question for text in ("a red ring", "two blue stars on green")]
    begun = [question.with_answer(janus.begin_image) for question in asked]
    janus.model.generation_config.generation_kwargs = {"boi_token_id": janus.begin_image[0]}
    for item, codes in zip(begun, janus.generate_codes(begun), strict=True):
        config = GenerationConfig(
            pad_token_id=0, bos_token_id=1, eos_token_id=2, guidance_scale=5.0, do_sample=False, max_length=200
        )
        config.generation_kwargs = {"boi_token_id": janus.begin_image[0]}
        found = janus.model.generate(
            inputs=item.ids[None],
            attention_mask=torch.ones_like(item.ids[None]),
            generation_mode="image",
            generation_config=config,
        )
        assert found[0].tolist() == codes.tolist()
    assert len(codes.unique()) > 2


def test_images_equal_those_of_transformers(janus: JanusBackbone) -> None:
    codes = torch.arange(32).view(2, 16)
    decoded = janus.model.decode_image_tokens(codes)
    for ours, theirs in zip(janus._images(codes), decoded, strict=True):
        wanted = ((theirs * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
        assert (ours == wanted.numpy()).all()


def test_gradients_reach_the_connections(janus: JanusBackbone, data: Path) -> None:
    """What is encoded is before the aligner; a picture read trains the aligner, one written the generation's three."""
    path = sorted(data.rglob("*.png"))[0]
    reading, writing = Sample("", (Turn("what?", "red"),), path), Sample("", (Turn("draw"),), target_image=path)
    found = {}
    for name, sample in (("read", reading), ("written", writing)):
        for parameter in janus.connections().values():
            parameter.grad = None
            parameter.requires_grad_()
        item = janus.encode([sample])[0]
        janus.loss([item]).total.backward()
        found[name] = {n.split(".")[2] for n, p in janus.connections().items() if p.grad is not None and p.grad.any()}
    assert found["read"] == {"aligner"}
    assert found["written"] == {"generation_aligner", "generation_embeddings", "generation_head"}
    features = janus.encode([reading])[0].read
    assert features.shape == (16, 24)
    assert not features.requires_grad


def test_an_image_read_is_padded_to_a_square(janus: JanusBackbone, tmp_path: Path) -> None:
    """The longer side fills the square, the rest is padded; the positions are as many whatever the picture's form."""
    from PIL import Image

    Image.new("RGB", (40, 10), (255, 0, 0)).save(tmp_path / "wide.png")
    item = janus.prepare(Sample("", (Turn("what?", "red"),), tmp_path / "wide.png"))
    assert item.read.shape == (3, 16, 16)
    torch.testing.assert_close(item.read[:, 8, 8], torch.tensor([1.0, -1.0, -1.0]))
    assert item.read[0, 0, 0].abs() < 0.01
    assert int((item.positions == IMAGE_READ).sum()) == 16
    assert torch.equal(item.read[None], stock.pixels(janus, tmp_path / "wide.png"))


def change(name: str, **values: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | values))

    return act


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shards(folder: Path) -> None:
    index = {
        "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def weights(act: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change_weights(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change_weights


def shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def other_words(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<begin_of_image>", "<begin_of_picture>")
        (folder / name).write_text(text)


BROKEN = {
    "no folder": (shutil.rmtree, "no folder .*weights: expected a folder with Janus.*--weights"),
    "no config": (remove("config.json"), "no config.json in .*: expected a folder with Janus"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not readable JSON"),
    "original": (change("config.json", model_type="multi_modality"), "model_type 'multi_modality', not 'janus'"),
    "emu3": (lambda folder: (shutil.rmtree(folder), write_emu3(folder)), "model_type 'emu3', not 'janus'"),
    "bad config": (change("config.json", vision_config={"image_size": "big"}), "cannot be loaded as Janus"),
    "no weights": (remove("model.safetensors"), r"no weights in .*: expected model.safetensors, or"),
    "pickle": (pickled, "found pytorch_model.bin, which is pickled and not read"),
    "no shard": (shards, "expected 2 files beside it, 1 are missing: model-00002-of-00002.safetensors"),
    "cut short": (cut, "cannot be loaded as JanusForConditionalGeneration: "),
    "no key": (weights(lambda t: t.pop("lm_head.weight")), "1 of the weights .* are missing: lm_head.weight;"),
    "shape": (weights(shorter), r"have other shapes: lm_head.weight( \(263, 32\), not \(264, 32\))?;"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json; copy it"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json has no model; copy",
    ),
    "other tokenizer": (other_words, "the tokenizer, of 264 tokens, has no <begin_of_image>; expected that of Janus"),
    "no image processor": (remove("preprocessor_config.json"), "has no preprocessor_config.json or processor_config"),
    "size": (change("preprocessor_config.json", size={"height": 8, "width": 8}), "gives images of 8 pixels, .* 16"),
    "processor": (
        change("preprocessor_config.json", image_processor_type="CLIPImageProcessor"),
        "expected a JanusImageP",
    ),
    "positions": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"num_image_tokens": 16', '"num_image_tokens": 15')
        ),
        "gives an image 15 positions, but 4 x 4 patches",
    ),
    "image token": (
        change("config.json", image_token_id=9),
        "<image_placeholder> is 3, config.json's image_token_id 9",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_what_is_wrong_with_a_folder(folder: Path, tmp_path: Path, case: str) -> None:
    act, told = BROKEN[case]
    copy = shutil.copytree(folder, tmp_path / "weights")
    act(copy)
    with pytest.raises(UserError, match=told):
        JanusBackbone.load("cpu", copy)


def test_more_words_than_embeddings(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    copy = shutil.copytree(folder, tmp_path / "weights")
    words = AutoTokenizer.from_pretrained(copy)
    words.add_tokens(["one", "more"])
    words.save_pretrained(copy)
    with pytest.raises(UserError, match="the tokenizer has 266 tokens, the model 264"):
        JanusBackbone.load("cpu", copy)
