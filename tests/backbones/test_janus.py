"""Janus against transformers' own image generation, gradients of its aligners, and broken folders."""

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
from cnext.backbones.sampling import CodeSampling
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_janus(tmp_path_factory.mktemp("weights") / "janus")


@pytest.fixture
def janus(folder: Path) -> JanusBackbone:
    return JanusBackbone.load("cpu", folder)


def test_the_authors_settings_are_the_defaults(janus: JanusBackbone) -> None:
    assert janus.sampling == CodeSampling(sample=True, temperature=1.0, top_k=0)
    assert (janus.guidance, janus.image_loss_weight, janus.begins_images) == (5.0, 1.0, False)


PROMPTS = {"pro": ("<|User|>", "<|Assistant|>"), "1.3b": ("User", "Assistant")}


@pytest.mark.parametrize("template", PROMPTS)
def test_prompts_are_the_released_ones(folder: Path, data: Path, template: str) -> None:
    """By the format string of the released processor, for each of the released weights."""
    janus, path = JanusBackbone.load("cpu", folder, template=template), sorted(data.rglob("*.png"))[0]
    user, assistant = PROMPTS[template]
    picture = f"<begin_of_image>{'<image_placeholder>' * 16}<end_of_image>"
    for sample, expected in (
        (Sample("", (Turn("a dog"),), asks_image=True), f"{user}: a dog\n\n{assistant}:"),
        (Sample("", (Turn("Why?"),), path), f"{stock.SYSTEM}{user}: {picture}\nWhy?\n\n{assistant}:"),
        (
            Sample("", (Turn("Why?", "so"), Turn("So?", "ok")), path),
            f"{stock.SYSTEM}{user}: {picture}\nWhy?\n\n{assistant}: so</s>{user}: So?\n\n{assistant}: ok</s>",
        ),
    ):
        for begins in (False, True):
            janus.begins_images = begins
            begin = "<begin_of_image>" if begins and sample.draws else ""
            prepared = janus.prepare(sample)
            found = prepared if sample.turns[0].answer else prepared.question
            assert found.ids.tolist() == janus.tokenizer.encode(expected + begin)


JANUS_PRO = "{% for message in messages %}<|User|>: {{ message.content }}{% endfor %}"
JANUS_13B = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}Assistant:"


def write_template(folder: Path, name: str, template: str) -> None:
    if name.endswith(".jinja"):
        (folder / name).write_text(template)
        return
    known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(known | {"chat_template": template}))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(("template", "pro"), [(JANUS_PRO, True), (JANUS_13B, False)], ids=["pro", "1.3b"])
def test_the_folders_chat_template_decides(folder: Path, tmp_path: Path, name: str, template: str, pro: bool) -> None:
    copy = shutil.copytree(folder, tmp_path / "weights")
    write_template(copy, name, template)
    assert JanusBackbone.load("cpu", copy).pro == pro
    assert not JanusBackbone.load("cpu", copy, template="1.3b").pro
    assert JanusBackbone.load("cpu", copy, template="pro").pro


def test_a_tokenizer_without_the_speakers_is_of_janus_13b(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "weights")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_text((copy / name).read_text().replace("<|User|>", "<|Human|>"))
    janus = JanusBackbone.load("cpu", copy)
    assert not janus.pro
    assert janus.prepare(Sample("", (Turn("a", "b"),))).question.ids.tolist() == stock.prompt(
        janus, Sample("", (Turn("a"),))
    )
    with pytest.raises(UserError, match=r"has no <\|User\|>; expected that of Janus"):
        JanusBackbone.load("cpu", copy, template="pro")


def test_a_folder_named_as_janus_13b_with_the_template_of_pro_is_warned_of(folder: Path, tmp_path: Path) -> None:
    """transformers' conversion writes Janus-Pro's chat template for both."""
    copy = shutil.copytree(folder, tmp_path / "Janus-1.3B")
    write_template(copy, "chat_template.jinja", JANUS_PRO)
    with pytest.warns(UserWarning, match=r"named as Janus-1\.3B but has Janus-Pro's chat template.*template=1\.3b"):
        assert JanusBackbone.load("cpu", copy).pro
    assert not JanusBackbone.load("cpu", copy, template="1.3b").pro
    assert JanusBackbone.load("cpu", copy, template="pro").pro, "confirmed, without a warning"
    with pytest.raises(UserError, match=r"template of janus '1\.5b'"):
        JanusBackbone.load("cpu", copy, template="1.5b")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_codes_are_sampled_as_by_transformers(
    janus: JanusBackbone, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distribution of each code, guided, after those that transformers has drawn by its own generator."""
    item = janus.prepare(Sample("", (Turn("a red ring"),))).question.with_answer(janus.begin_image)
    config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, guidance_scale=5.0, do_sample=True, max_length=200, top_k=0
    )
    config.temperature = temperature
    config.generation_kwargs = {"boi_token_id": janus.begin_image[0]}
    drawn, probabilities = torch.multinomial, []

    def multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        probabilities.append(probs[0].double())
        return drawn(probs, num_samples)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    torch.manual_seed(0)
    found = janus.model.generate(
        inputs=item.ids[None],
        attention_mask=torch.ones_like(item.ids[None]),
        generation_mode="image",
        generation_config=config,
    )
    theirs = found[0].tolist()
    assert len(set(theirs)) > 2
    janus.sampling = stock.Followed(theirs)
    janus.generate_codes([item], [0])
    for logits, expected in zip(janus.sampling.seen, probabilities, strict=True):
        shares = stock.shares(CodeSampling(temperature=temperature), logits)
        torch.testing.assert_close(shares, expected, rtol=0, atol=1e-3)


def test_codes_equal_those_of_transformers(janus: JanusBackbone) -> None:
    """Greedy, two captions of different lengths, with the released guidance."""
    janus.sampling = CodeSampling(sample=False)
    asked = [janus.prepare(Sample("", (Turn(text),))).question for text in ("a red ring", "two blue stars on green")]
    begun = [question.with_answer(janus.begin_image) for question in asked]
    janus.model.generation_config.generation_kwargs = {"boi_token_id": janus.begin_image[0]}
    for item, codes in zip(begun, janus.generate_codes(begun, [0, 1]), strict=True):
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
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values))

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
    act, message = BROKEN[case]
    copy = shutil.copytree(folder, tmp_path / "weights")
    act(copy)
    with pytest.raises(UserError, match=message):
        JanusBackbone.load("cpu", copy)


def test_more_words_than_embeddings(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    copy = shutil.copytree(folder, tmp_path / "weights")
    words = AutoTokenizer.from_pretrained(copy)
    words.add_tokens(["one", "more"])
    words.save_pretrained(copy)
    with pytest.raises(UserError, match="the tokenizer has 266 tokens, the model 264"):
        JanusBackbone.load("cpu", copy)
