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
from cnext.backbones.emu3 import NEGATIVE_PROMPT, Emu3Backbone
from cnext.backbones.sampling import CodeSampling
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


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("negative", [NEGATIVE_PROMPT, ""], ids=["released", "empty"])
def test_codes_equal_those_of_transformers(folder: Path, sampled: bool, negative: str) -> None:
    """With the row ends enforced, and guidance away from the negative prompt in the released form. Where transformers
    samples, by its own generator, each code's distribution is the same after the codes that it has drawn."""
    emu3 = Emu3Backbone.load("cpu", folder, sample=False, negative_prompt=negative)
    begun = "<s>two blue stars<|image start|>4*4<|image token|>"
    item = emu3.prepare(Sample("", (Turn("two blue stars"),), asks_image=True)).question.with_answer(emu3.begin_image)
    assert item.ids.tolist() == emu3.tokenizer.encode(begun)
    start, visual = len(item), list(range(emu3.first_code, emu3.first_code + CODES))

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        # The first call of a run that guides is with the ids of the unguided half as well.
        return [emu3.row_end] if (len(ids) - start + 1) % 5 == 0 else visual

    blank = torch.tensor([emu3.tokenizer.encode(f"<s>{negative}<|image start|>4*4<|image token|>")])
    torch.manual_seed(0)
    found = emu3.model.generate(
        input_ids=item.ids[None],
        attention_mask=torch.ones_like(item.ids[None]),
        max_new_tokens=19,
        **({"do_sample": True, "top_k": 6} if sampled else {"do_sample": False}),
        guidance_scale=3.0,
        negative_prompt_ids=blank,
        negative_prompt_attention_mask=torch.ones_like(blank),
        prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True,
        output_scores=True,
    )
    written = [index for index in range(19) if (index + 1) % 5]
    theirs = [int(found.sequences[0, start + index]) - emu3.first_code for index in written]
    assert len(set(theirs)) > 2
    if not sampled:
        assert emu3.generate_codes([item], [0])[0].tolist() == theirs
        assert found.sequences[0, start:].tolist() == stock.tokens(emu3, with_row_ends(theirs))[:-1]
        return
    emu3.sampling = stock.Followed(theirs)
    emu3.generate_codes([item], [0])
    codes = slice(emu3.first_code, emu3.first_code + CODES)
    for logits, index in zip(emu3.sampling.seen, written, strict=True):
        shares = stock.shares(CodeSampling(top_k=6), logits)
        torch.testing.assert_close(shares, found.scores[index][0, codes].double().softmax(-1), rtol=0, atol=1e-3)


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


def test_the_authors_settings_are_the_defaults(emu3: Emu3Backbone) -> None:
    assert emu3.sampling == CodeSampling(sample=True, temperature=1.0, top_k=2048)
    assert (emu3.guidance, emu3.image_loss_weight, emu3.begins_images) == (3.0, 0.5, False)
    assert emu3.negative_prompt.startswith("lowres, bad anatomy")


def test_prompts_are_the_released_ones(emu3: Emu3Backbone, wide: Path) -> None:
    """By the format strings of the released processor, about an image and for one; nothing released edits."""
    seen = f"<|image start|>3*7<|image token|>{'<image>' * 24}<|extra_201|><|image end|>"
    drawn = "<|image start|>4*4<|image token|>"
    chat = "<s>You are a helpful assistant. USER: {}. ASSISTANT:"
    for sample, expected in (
        (Sample("", (Turn("What is it?"),), wide), chat.format(f"{seen}What is it?")),
        (Sample("", (Turn("What is it?"),)), chat.format("What is it?")),
        (Sample("", (Turn("a dog"),), asks_image=True), "<s>a dog"),
        (Sample("", (Turn("a dog"),), target_image=wide), "<s>a dog"),
        (Sample("", (Turn("Please generate the image. a dog"),), target_image=wide), "<s>a dog"),
        (Sample("", (Turn("Generate an image: Please generate the image: a dog"),), asks_image=True), "<s>a dog"),
        (Sample("", (Turn("Blur it"),), wide, asks_image=True), chat.format(f"{seen}Blur it")),
        (Sample("", (Turn("Hi", "Hi"), Turn("a dog")), target_image=wide), chat.format("Hi")),
    ):
        for begins in (False, True) if len(sample.turns) == 1 else (False,):
            emu3.begins_images = begins
            words = emu3.tokenizer.encode(expected + (drawn if begins and sample.draws else ""))
            slots = [emu3.pad_id if token == emu3.vocabulary["<image>"] else token for token in words]
            assert emu3.prepare(sample).question.ids.tolist() == slots, expected


def test_a_positive_prompt_is_for_images_to_generate(folder: Path, wide: Path) -> None:
    emu3 = Emu3Backbone.load("cpu", folder, positive_prompt=" best quality.")
    for sample, expected in (
        (Sample("", (Turn("a dog."),), asks_image=True), "<s>a dog. best quality."),
        (Sample("", (Turn("a dog."),), target_image=wide), "<s>a dog."),
        (Sample("", (Turn("Blur it"),), asks_image=True, image=wide), None),
    ):
        found = emu3.tokenizer.decode(emu3.prepare(sample).question.ids)
        assert found == expected if expected else "best quality" not in found


def released_labels(emu3: Emu3Backbone, ids: torch.Tensor) -> torch.Tensor:
    """Labels of the released training script: the visual tokens, by their range of ids, and nothing else."""
    first, last = (emu3.vocabulary[f"<|visual token {code:06d}|>"] for code in (0, CODES - 1))
    return torch.where((ids >= first) & (ids <= last), ids, IGNORED)


def test_the_released_loss_equals_that_of_the_stock_class(folder: Path, wide: Path) -> None:
    """Two captions of different lengths, tokens from the released format string; loss and gradients."""
    emu3 = Emu3Backbone.load("cpu", folder, loss="released")
    captions = ("two blue stars", "a ring")
    items = emu3.encode([Sample("", (Turn(caption),), target_image=wide) for caption in captions])
    layer, head = emu3.language_model.layers[0].self_attn.q_proj.weight, emu3.lm_head.weight
    rows = []
    for caption, item in zip(captions, items, strict=True):
        tokens = emu3.tokenizer.convert_ids_to_tokens((emu3.first_code + item.codes[item.codes != IGNORED]).tolist())
        image = "<|extra_200|>".join("".join(tokens[start : start + 4]) for start in range(0, 16, 4))
        around = f"<|image start|>4*4<|image token|>{image}<|extra_200|><|extra_201|><|image end|>"
        rows.append(torch.tensor(emu3.tokenizer.encode(f"<s>{caption}{around}")))
        assert item.ids.tolist() == [*rows[-1].tolist(), emu3.eos_id], "the end follows, unsupervised"
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, emu3.pad_id)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    labels = released_labels(emu3, ids)
    assert int((labels != IGNORED).sum()) == 32
    learnt = [layer.requires_grad_(), head.requires_grad_()]
    expected = emu3.model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    gradients = torch.autograd.grad(expected, learnt)
    loss = emu3.loss(items)
    torch.testing.assert_close(loss.total, expected)
    assert (loss.text, loss.tokens) == (0, 32)
    for found, wanted in zip(torch.autograd.grad(loss.total, learnt), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # Divided into two parts, as by micro-batches: the parts' losses add up.
    whole = tuple(map(float, emu3.supervised(items)))
    torch.testing.assert_close(sum(emu3.loss([item], whole).total for item in items), expected)


def test_the_released_loss_leaves_text_as_it_is(folder: Path, wide: Path) -> None:
    """An answer's tokens are supervised; of an edit the codes alone; the prompt begins the image."""
    emu3, plain = Emu3Backbone.load("cpu", folder, loss="released"), Emu3Backbone.load("cpu", folder)
    answered = Sample("", (Turn("what?", "red"),), wide)
    torch.testing.assert_close(emu3.loss(emu3.encode([answered])).total, plain.loss(plain.encode([answered])).total)
    edit = emu3.encode([Sample("", (Turn("blur"),), wide, wide)])[0]
    assert not (edit.labels != IGNORED).any()
    assert edit.question.ids.tolist()[-len(emu3.begin_image) :] == emu3.begin_image
    assert emu3.generate([Sample("", (Turn("blur"),), wide, asks_image=True)], 2)[0].image is not None
    assert torch.isfinite(emu3.loss(emu3.encode([answered, Sample("", (Turn("draw"),), target_image=wide)])).total)


def test_unknown_losses_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match="loss of emu3 'theirs'"):
        Emu3Backbone.load("cpu", folder, loss="theirs")


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
