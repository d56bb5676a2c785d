"""The tiny backbone: tokenizer, sequences, loss, and greedy generation with a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cnext.backbones.base import Backbone
from cnext.backbones.tiny import model as tiny_model
from cnext.backbones.tiny.model import IGNORED, TinyBackbone, pixels
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.backbones.tiny.vision import SIZES
from cnext.errors import UserError
from cnext.scoring.base import Prediction
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample, Turn

TOKENS = SIZES.tokens

TASKS = ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")


def samples(data: Path, task: str, split: str = "train") -> list[Sample]:
    return formats.read_samples(suites.load("next-tiny").task(task), data, split)


def test_parameter_counts(tiny: TinyBackbone) -> None:
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in tiny.named_children()}
    assert (count["encoder"], count["detokenizer"]) == (105_312, 219_939)
    assert 840_000 < sum(count.values()) - count["encoder"] - count["detokenizer"] < 880_000
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


def test_text_sequence(tiny: TinyBackbone) -> None:
    """Two turns: only the answers and the end are supervised; the picture comes before the first question."""
    token = tiny.tokenizer
    sample = Sample("1", (Turn("what color", "red"), Turn("what shape", "ring")), image=Path("picture"))
    item = tiny.assemble(sample, torch.zeros(TOKENS, 64), None)
    names = [token.tokens[index] for index in item.ids]
    assert names[:3] == ["<s>", "[inst]", "<img>"]
    assert names[3 : 3 + TOKENS] == ["<patch>"] * TOKENS
    assert names[3 + TOKENS :] == [
        "</img>",
        "what",
        "color",
        "[/inst]",
        "red",
        "\n",
        "[inst]",
        "what",
        "shape",
        "[/inst]",
        "ring",
        "</s>",
    ]
    assert [token.tokens[label] for label in item.labels if label != IGNORED] == ["red", "ring", "</s>"]


def test_a_row_of_very_many_words_is_refused_by_its_place(tiny: TinyBackbone) -> None:
    for turns in ((Turn("word " * 40_000, "a"),), (Turn("q", "word " * 40_000),)):
        with pytest.raises(
            UserError, match=r"^a\.jsonl:7 has 40,\d+ tokens, and the tiny backbone reads at most 8,192;"
        ):
            tiny.assemble(Sample("1", turns, origin="a.jsonl:7"), None, None)
    with pytest.raises(UserError, match=r"^'word word .*' has 40,00"):
        tiny.generate([Sample("", (Turn("word " * 40_000 + "?"),))], 4)


def test_image_sequence(tiny: TinyBackbone) -> None:
    """A picture to write is <img>, supervised, and 16 queries, which are not."""
    sample = Sample("1", (Turn("draw red ring"),), target_image=Path("picture"))
    item = tiny.assemble(sample, None, torch.zeros(TOKENS, 64))
    token = tiny.tokenizer
    assert [token.tokens[index] for index in item.ids][-TOKENS - 1 :] == ["<img>"] + ["<patch>"] * TOKENS
    assert [token.tokens[label] for label in item.labels if label != IGNORED] == ["<img>"]


@pytest.mark.parametrize(
    ("text", "tokens", "decoded"),
    [
        ("Red", ["red"], "red"),
        ("[0.38,0.41]", [*"[", "0.", *"38,", "0.", *"41]"], "[0.38,0.41]"),
        ("Fox", ["#f", "#o", "#x"], "fox"),
        ("it is a fox ring", ["it", "is", "a", "#f", "#o", "#x", "ring"], "it is a fox ring"),
        ("what? (red)", ["what", "?", "red"], "what? red"),
        ("red <img> </s> ring", ["red", "<img>", "</s>", "ring"], "red ring"),
        ("", [], ""),
    ],
)
def test_tokenizer(text: str, tokens: list[str], decoded: str) -> None:
    tokenizer = TinyTokenizer()
    ids = tokenizer.encode(text)
    assert [tokenizer.tokens[index] for index in ids] == tokens
    assert tokenizer.decode(ids) == decoded


@pytest.mark.parametrize("task", TASKS)
def test_loss_equals_a_loop_over_samples(tiny: TinyBackbone, data: Path, task: str) -> None:
    """The batch's loss equals CE + 6 MSE put together sample by sample, without padding."""
    encoded = tiny.encode(samples(data, task)[:5])
    loss = tiny.loss(encoded)
    logits, labels, drawn, wanted = [], [], [], []
    for item in encoded:
        embeddings, writes = tiny._embed(item.ids[None], [item.features], [item.target is not None], item.ids[None] < 0)
        hidden = tiny.decoder.model(inputs_embeds=embeddings).last_hidden_state[0]
        keep = item.labels[1:] != IGNORED
        logits.append(tiny.decoder.lm_head(hidden[:-1][keep]))
        labels.append(item.labels[1:][keep])
        if item.target is not None:
            drawn.append(tiny.output_projection(hidden[writes[0]]))
            wanted.append(item.target)
    text = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    image = F.mse_loss(torch.stack(drawn), torch.stack(wanted)) if drawn else torch.zeros(())
    torch.testing.assert_close(loss.text, text)
    torch.testing.assert_close(loss.image, image)
    torch.testing.assert_close(loss.total, text + tiny.image_loss_weight * image)
    assert loss.tokens == sum(map(len, labels)) + TOKENS * len(wanted)


@torch.no_grad()
def assert_greedy(tiny: TinyBackbone, sample: Sample, answer: Prediction, *front: torch.Tensor) -> None:
    """An answer is that of a loop without a cache or padding, behind embeddings if any are given."""
    token = tiny.tokenizer
    features = tiny.features([pixels(sample.image)])[0] if sample.image else None
    ids, written = tiny.prompt(sample), []
    while len(written) < 20 and not (written and written[-1] in (token["</s>"], token["<img>"])):
        tokens = torch.tensor([ids + written])
        embeddings, _ = tiny._embed(tokens, [features], [False], tokens < 0)
        hidden = tiny.decoder.model(inputs_embeds=torch.cat([*front, embeddings], 1)).last_hidden_state
        logits = tiny.decoder.lm_head(hidden[0, -1])
        logits[[token["<pad>"], token["<s>"], token["<patch>"]]] = -torch.inf
        written.append(int(logits.argmax()))
    assert token.decode(written) == answer.text
    assert (written[-1] == token["<img>"]) == (answer.image is not None)


def test_generation_equals_a_loop_without_cache(tiny: TinyBackbone, data: Path) -> None:
    """The cache and the padding on the left change no token."""
    mixed = (
        samples(data, "VQAv2", "test")[:4]
        + samples(data, "RefCOCO", "test")[:4]
        + samples(data, "Flickr30k", "test")[:2]
    )
    for sample, answer in zip(mixed, tiny.generate(mixed, 20), strict=True):
        assert_greedy(tiny, sample, answer)


def test_images_of_questions_are_encoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as files, weights and the batch are the same; the answers are those without."""
    model, (first, second, *_) = TinyBackbone.load(), samples(data, "ImageNet", "test")
    path, encoded = tmp_path / "picture.png", list[int]()
    path.write_bytes(first.image.read_bytes())
    asked = [replace(first, image=path), replace(second, turns=(Turn("what is this"),), image=None)]
    features = model.features
    monkeypatch.setattr(model, "features", lambda images: encoded.append(len(images)) or features(images))

    def answered(again: bool) -> list[Prediction]:
        before = len(encoded)
        found = model.generate(asked, 3)
        assert len(encoded) == before + again
        return found

    assert answered(True) == answered(False)
    path.write_bytes(second.image.read_bytes())
    model._kept, of_first = {}, dict(model._kept)
    fresh = answered(True)
    model._kept = of_first
    assert answered(True) == fresh
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(2)
    answered(True)
    asked.append(asked[0])
    answered(True)
    answered(False)
    with torch.autocast("cpu", torch.bfloat16):
        answered(True)
    monkeypatch.setattr(tiny_model, "KEPT_BYTES", sum(kept.nbytes for kept in model._kept.values()))
    asked.append(asked[0])
    answered(True)
    answered(True)
    path.unlink()
    with pytest.raises(UserError, match=r"picture\.png"):
        model.generate(asked, 3)


def test_generation_reads_no_target(tiny: TinyBackbone, data: Path) -> None:
    """The answer to a sample does not depend on its reference answer or its target image."""
    sample = samples(data, "HQEdit", "test")[0]
    blind = Sample(sample.id, (Turn(sample.turns[0].instruction, "nonsense"),), sample.image, Path("nowhere.png"))
    one, other = tiny.generate([sample], 8)[0], tiny.generate([blind], 8)[0]
    assert one.text == other.text
    assert (one.image is None) == (other.image is None)
    assert one.image is None or (one.image == other.image).all()


@pytest.mark.parametrize("task", ["VQAv2", "HQEdit"])
def test_question_features_are_the_last_state_of_the_instruction(tiny: TinyBackbone, data: Path, task: str) -> None:
    """Sample by sample without padding; another answer, more turns or another target change nothing."""
    several = samples(data, task)[:5]
    found = tiny.question_features(tiny.encode(several))
    for sample, features in zip(several, found, strict=True):
        ids = torch.tensor([tiny.prompt(sample)])
        embeddings, _ = tiny._embed(ids, [tiny.features([pixels(sample.image)])[0]], [False], ids < 0)
        hidden = tiny.decoder.model(inputs_embeds=embeddings).last_hidden_state[0, -1]
        torch.testing.assert_close(features, hidden, rtol=1e-4, atol=1e-4)
    asked = [Sample("", (Turn(sample.turns[0].instruction),), sample.image) for sample in several]
    torch.testing.assert_close(tiny.question_features(tiny.encode(asked)), found, rtol=1e-5, atol=1e-5)
    assert tiny.question_features([]).shape == (0, 128)
    torch.testing.assert_close(tiny.question_means(tiny.encode(asked)), tiny.question_means(tiny.encode(several)))


def test_question_means_are_of_the_positions_that_read_text(tiny: TinyBackbone, data: Path) -> None:
    """In batches as one at a time, and by hand from the states of one question."""
    several = [sample for task in ("VQAv2", "Flickr30k") for sample in samples(data, task)[:3]]
    encoded = tiny.encode(several)
    found = tiny.question_means(encoded)
    torch.testing.assert_close(Backbone.question_means(tiny, encoded), found, rtol=1e-5, atol=1e-5)
    for index in (0, 5):
        inputs, _ = tiny._embed(
            encoded[index].question[None],
            [encoded[index].features],
            [False],
            torch.zeros(1, len(encoded[index].question)).bool(),
        )
        states = tiny.decoder.model(inputs_embeds=inputs).last_hidden_state[0]
        text = (tiny.positions[0] == 0)[:-1]
        assert text.sum() == len(text) - (16 if index == 0 else 0)
        torch.testing.assert_close(found[index], states[:-1][text].mean(0), rtol=1e-5, atol=1e-5)
    assert tiny.question_means([]).shape == (0, 128)


def test_choice_logits_of_one_token_answers(tiny: TinyBackbone, data: Path) -> None:
    """The largest over all words is what generation writes first; the samples' own answers are not read."""
    several = samples(data, "VQAv2", "test")[:6]
    words = ["red", "blue", "ring", "yes"]
    found = tiny.choice_logits(several, words)
    assert torch.equal(
        tiny.choice_logits([Sample("", (Turn(s.turns[0].instruction),), s.image) for s in several], words), found
    )
    for sample, logits in zip(several, found, strict=True):
        ids = torch.tensor([tiny.prompt(sample)])
        embeddings, _ = tiny._embed(ids, [tiny.features([pixels(sample.image)])[0]], [False], ids < 0)
        every = tiny.decoder.lm_head(tiny.decoder.model(inputs_embeds=embeddings).last_hidden_state[0, -1])
        torch.testing.assert_close(logits, every[[tiny.tokenizer[word] for word in words]], rtol=1e-4, atol=1e-4)
    assert tiny.choice_logits([], words).shape == (0, 4)


def test_choice_logits_compare_the_first_difference(tiny: TinyBackbone, data: Path) -> None:
    """Of "red ring" and "red square" the second word; one answer alone is a column of its own."""
    several = samples(data, "VQAv2", "test")[:3]
    found = tiny.choice_logits(several, ["red ring", "red square"])
    for sample, logits in zip(several, found, strict=True):
        answered = Sample("", (Turn(sample.turns[0].instruction, "red ring"),), sample.image)
        expected = tiny.output(tiny.encode([answered])).logits[1]
        torch.testing.assert_close(
            logits, expected[[tiny.tokenizer["ring"], tiny.tokenizer["square"]]], rtol=1e-4, atol=1e-4
        )
    assert tiny.choice_logits(several, ["red"]).shape == (3, 1)


def test_pictures_have_the_right_form(tiny: TinyBackbone, data: Path) -> None:
    drawn = [p.image for p in tiny.generate(samples(data, "Flickr30k", "test"), 8) if p.image is not None]
    assert drawn, "the pretrained model draws"
    assert all(image.shape == (48, 48, 3) and image.dtype.name == "uint8" for image in drawn)


def test_encoder_and_detokenizer_agree(tiny: TinyBackbone, data: Path) -> None:
    """The autoencoder's round trip is far closer to the picture than another picture is."""
    paths = [sample.image for sample in samples(data, "VQAv2")]
    features = tiny.features([pixels(path) for path in paths])
    pictures = tiny.detokenizer(features)
    error = F.mse_loss(tiny.encoder(pictures), features)
    assert error < 0.25 * F.mse_loss(features.roll(1, 0), features)


def test_missing_weights_and_those_of_another_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors: expected a file of tensors"):
        TinyBackbone.load(weights=tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"cannot read it: it is a folder\nleave out --weights"):
        TinyBackbone.load(weights=tmp_path)
    torch.save({"llm.weight": torch.ones(2)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"other\.bin: expected weights of the tiny backbone(.|\n)*leave out --weights"):
        TinyBackbone.load(weights=tmp_path / "other.bin")
