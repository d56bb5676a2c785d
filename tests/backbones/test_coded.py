"""Janus and Emu3 on all six tasks: sequences, losses, branches, generation, against transformers' own classes."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import stock
from backbones.small_folders import CODES, WRITERS
from backbones.test_tiny import TASKS, samples
from PIL import Image
from torch.nn import functional as F

from cnext import adapters, backbones, methods
from cnext.backbones.coded import CodedBackbone
from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.emu3 import NEGATIVE_PROMPT
from cnext.backbones.sampling import image_seed, uniform
from cnext.errors import UserError
from cnext.tasks import suites
from cnext.tasks.base import Sample, Turn

Load = Callable[..., CodedBackbone]


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("weights") / request.param)


@pytest.fixture(scope="module")
def loaded() -> dict[str, CodedBackbone]:
    return {}


@pytest.fixture
def load(folder: Path, loaded: dict[str, CodedBackbone]) -> Load:
    """Loads with these options, or copies what was loaded with them."""

    def copied(**options: object) -> CodedBackbone:
        key = f"{folder} {options}"
        if key not in loaded:
            loaded[key] = backbones.load(folder.name).load("cpu", folder, **options)
        return copy.deepcopy(loaded[key])

    return copied


def always_draws(backbone: CodedBackbone) -> CodedBackbone:
    """Of all tokens, it may write the one that begins a picture."""
    backbone.banned_ids = [token for token in range(len(backbone.tokenizer)) if token != backbone.begin_image[0]]
    return backbone


@pytest.mark.parametrize("task", TASKS)
def test_mage_trains_only_the_branches_of_the_task(load: Load, data: Path, task: str) -> None:
    backbone, suite = load(), suites.load("next-tiny")
    mage = methods.load("mage-paper")()
    mage.setup(backbone, [suite.task(name) for name in TASKS], torch.Generator().manual_seed(0))
    trainable = mage.trainable(suite.task(task))
    encoded = backbone.train().encode(samples(data, task)[:3])
    loss = backbone.loss(encoded)
    loss.total.backward()
    assert {name for name, p in mage.adapter_parameters().items() if p.grad is not None} == set(trainable)
    assert not any(p.grad is not None for name, p in backbone.named_parameters() if ".branches." not in name)
    assert all(torch.isfinite(p.grad).all() for p in trainable.values())
    assert all(p.grad.any() for name, p in trainable.items() if name.endswith(".B"))
    assert bool(loss.image) == ("image" in suite.task(task).writes)
    assert loss.tokens == backbone.supervised(encoded)[0] + 16 * backbone.supervised(encoded)[1]
    targets = {name.rsplit(".", 1)[1] for name in adapters.layers(backbone.language_model)}
    assert targets == set(backbone.targets)
    assert len(adapters.layers(backbone.language_model)) == 2 * 7


@pytest.mark.parametrize("task", ["VQAv2", "Flickr30k", "HQEdit"])
def test_loss_equals_a_loop_over_positions(load: Load, data: Path, task: str) -> None:
    """In double precision, each token and each code from everything before it, by transformers' forward pass."""
    backbone = load(dtype=torch.float64)
    several = samples(data, task)[:2]
    text, image = [], []
    with torch.no_grad():
        for sample in several:
            ids, read, codes = stock.prompt(backbone, sample), stock.pixels(backbone, sample.image), []
            item = backbone.encode([sample])[0]
            for token, label, code in zip(item.ids, item.labels, item.codes, strict=True):
                if code != IGNORED:
                    image.append(F.cross_entropy(stock.step(backbone, ids, read, codes)[1], code))
                    codes.append(int(code))
                elif label != IGNORED:
                    text.append(F.cross_entropy(stock.step(backbone, ids, read, codes)[0], label))
                    if token == backbone.row_end:
                        codes.append(stock.ROW_END)
                    else:
                        ids, codes = (
                            [*ids, *stock.tokens(backbone, codes), int(token)] if codes else [*ids, int(token)],
                            [],
                        )
        found = backbone.loss(backbone.encode(several))
    torch.testing.assert_close(found.text.double(), torch.stack(text).mean(), rtol=1e-6, atol=1e-6)
    wanted = torch.stack(image).mean() if image else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(found.image.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.total, found.text + backbone.image_loss_weight * found.image)
    assert len(image) == (16 * len(several) if task in ("Flickr30k", "HQEdit") else 0)


def test_padding_changes_nothing(load: Load, data: Path) -> None:
    backbone = load(dtype=torch.float64)
    mixed = [samples(data, task)[index] for index, task in enumerate(TASKS)]
    together = backbone.output(backbone.encode(mixed))
    alone = [backbone.output(backbone.encode([sample])) for sample in mixed]
    for name in ("logits", "labels", "image_pred", "image_target"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))
    assert together.image_pred.shape == (2, 16, CODES)
    assert together.image_target.shape == (2, 16)
    assert together.image_target.dtype == torch.int64


def test_the_question_is_the_released_prompt(load: Load, data: Path) -> None:
    """Token by token as one string gives it, the picture before or after the words or not there."""
    backbone = load()
    for sample in (*samples(data, "VQAv2")[:1], *samples(data, "Flickr30k")[:1]):
        for first in (True, False):
            asked = replace(sample, image_first=first)
            found = backbone.prepare(asked).question.ids.tolist()
            wanted = stock.prompt(backbone, asked)
            if backbone.name == "emu3":
                wanted = [backbone.pad_id if backbone.tokenizer.decode([i]) == "<image>" else i for i in wanted]
            assert found == wanted


def test_answers_alone_are_supervised_each_with_its_end(load: Load) -> None:
    backbone = load()
    item = backbone.prepare(Sample("", (Turn("what?", "red"), Turn("shape <|User|> </s>", "ring"))))
    runs = [
        list(run) for supervised, run in groupby(item.labels.tolist(), lambda label: label != IGNORED) if supervised
    ]
    assert [backbone.tokenizer.decode(run) for run in runs] == [" red</s>", " ring</s>"]
    assert int((item.ids == backbone.eos_id).sum()) == 2, "a special token typed into a question is its letters"
    assert (item.ids[item.labels != IGNORED] == item.labels[item.labels != IGNORED]).all()


def test_every_position_has_its_role(load: Load, data: Path) -> None:
    """Editing, and a second question about the picture read."""
    backbone = load()
    sample = samples(data, "HQEdit")[0]
    item = backbone.prepare(sample)
    runs = [(role, len(list(run))) for role, run in groupby(item.positions.tolist())]
    before, after = runs[0][1], runs[2][1]
    # The last position of the question gives the first token of the answer.
    begin = len(backbone.begin_image)
    end = [(TEXT_WRITTEN, 4)] if backbone.name == "emu3" else []
    slots, codes = (20, 20 - 1) if backbone.name == "emu3" else (16, 16)
    assert runs == [
        (TEXT_READ, before),
        (IMAGE_READ, slots),
        (TEXT_READ, after),
        (TEXT_WRITTEN, begin),
        (IMAGE_WRITTEN, 1 + codes),
        *end,
    ]
    two = backbone.prepare(Sample("", (Turn("a?", "b"), Turn("c?", "d")), sample.image))
    roles = [role for role, _ in groupby(two.positions.tolist())]
    assert roles == [TEXT_READ, IMAGE_READ, TEXT_READ, TEXT_WRITTEN, TEXT_READ, TEXT_WRITTEN]


def test_roles_in_generation_are_those_of_training(load: Load, data: Path) -> None:
    backbone, sample, seen = always_draws(load()), samples(data, "HQEdit")[0], []
    backbone.guidance = 1
    backbone.language_model.register_forward_pre_hook(lambda *_: seen.append(backbone.positions))
    backbone.generate([sample], 3)
    item = backbone.encode([sample])[0]
    backbone.output([item])
    question = len(item.question)
    assert torch.equal(seen[0][0], item.positions[:question])
    drawn = torch.cat([positions[0] for positions in seen[1:-1]])
    assert torch.equal(drawn, item.positions[: len(drawn)])
    assert len(drawn) == question + len(backbone.begin_image) + (18 if backbone.name == "emu3" else 15)
    assert torch.equal(seen[-1][0], item.positions)


@pytest.mark.parametrize(
    ("draws", "options"),
    [
        (False, {}),
        (True, {"guidance": 1.0, "sample": False}),
        (True, {"guidance": 3.0, "sample": False}),
        (True, {"guidance": 1.0}),
        (True, {"guidance": 2.0, "temperature": 0.5, "top_k": 4}),
    ],
    ids=["text", "picture", "guided", "sampled", "sampled and guided"],
)
def test_generation_equals_a_loop_without_cache(load: Load, data: Path, draws: bool, options: dict) -> None:
    """Neither the cache nor the padding on the left changes a token or a code."""
    backbone = load(dtype=torch.float64, **options)
    backbone = always_draws(backbone) if draws else backbone
    asked = [samples(data, task, "test")[0] for task in ("VQAv2", "Flickr30k", "HQEdit")]
    answers = backbone.generate(asked, 6)
    with torch.no_grad():
        for sample, answer in zip(asked, answers, strict=True):
            ids, read, written = stock.prompt(backbone, sample), stock.pixels(backbone, sample.image), []
            while len(written) < 6 and not (written and written[-1] in (backbone.eos_id, backbone.begin_image[0])):
                logits, _ = stock.step(backbone, [*ids, *written], read)
                logits[backbone.banned_ids] = -torch.inf
                written.append(int(logits.argmax()))
            assert backbone.tokenizer.decode(written, skip_special_tokens=True).strip() == answer.text
            assert (written[-1] == backbone.begin_image[0]) == (answer.image is not None)
            if answer.image is not None:
                begun = [*ids, *written, *backbone.begin_image[1:]]
                blank = [backbone.bos_id, *backbone.begin_image]
                if backbone.name == "janus":
                    blank[1:1] = [backbone.pad_id] * (len(begun) - 2)
                else:
                    blank[1:1] = backbone.tokenizer.encode(NEGATIVE_PROMPT)
                numbers, codes = uniform([image_seed(0, sample)], 16), []
                for place in range(16):
                    if place and place % 4 == 0 and backbone.row_end is not None:
                        codes.append(stock.ROW_END)
                    given, nothing = (stock.step(backbone, *row, codes)[1] for row in ((begun, read), (blank, None)))
                    logits = nothing + backbone.guidance * (given - nothing)
                    codes.append(int(backbone.sampling.choose(logits[None].float(), numbers[:, place])))
                picture = backbone._images(torch.tensor([[code for code in codes if code != stock.ROW_END]]))[0]
                # The VQ model computes in float32, and decodes the others' pictures beside this one.
                assert abs(picture.astype(int) - answer.image).max() <= 1
    assert all(answer.image is not None for answer in answers) or not draws


def test_a_trained_model_generates_its_training_samples(load: Load, data: Path) -> None:
    """Trained on a question and on a caption until both are known: the question's answer is written and no picture,
    and the caption's picture, code by code."""
    backbone = load(guidance=1.0, sample=False)
    both = [Sample("", (Turn("what?", "red"),)), samples(data, "Flickr30k")[0]]
    encoded = backbone.encode(both)
    learnt = [*backbone.language_model.parameters(), *backbone.model.lm_head.parameters()]
    learnt += backbone.connections().values()
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in learnt], 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = backbone.loss(encoded)
        loss.total.backward()
        optimizer.step()
    answer, drawn = backbone.generate(both, 8)
    assert (answer.text, answer.image) == ("red", None), loss
    wanted = backbone._images(encoded[1].codes[encoded[1].codes != IGNORED][None])[0]
    assert drawn.text == ""
    assert (drawn.image == wanted).all(), loss


def test_images_follow_from_the_seed_and_their_own_question(load: Load, data: Path) -> None:
    """Whatever else is generated with them, in which order, and whatever torch's own generator has drawn."""
    backbone = always_draws(load(dtype=torch.float64))
    asked = [*samples(data, "Flickr30k", "test")[:3], samples(data, "HQEdit", "test")[0]]
    together = [answer.image for answer in backbone.generate(asked, 3)]
    torch.manual_seed(5)
    for same in (
        [answer.image for answer in backbone.generate(asked[::-1], 3)][::-1],
        [backbone.generate([sample], 3)[0].image for sample in asked],
    ):
        assert all(abs(one.astype(int) - other).max() <= 1 for one, other in zip(together, same, strict=True))
    backbone.seed = 1
    other = [answer.image for answer in backbone.generate(asked, 3)]
    assert all((one != two).any() for one, two in zip(together, other, strict=True))


@pytest.mark.parametrize("task", ["Flickr30k", "HQEdit"])
def test_the_prompt_begins_the_image(load: Load, data: Path, task: str) -> None:
    """The begin tokens end the prompt, are neither supervised nor generated, and give the first code as before."""
    backbone, plain = load(begins_images=True, guidance=1.0), load(guidance=1.0)
    sample, question = samples(data, task)[0], samples(data, task, "test")[0]
    item, before = backbone.encode([sample])[0], plain.encode([sample])[0]
    assert torch.equal(item.ids, before.ids)
    assert torch.equal(item.codes, before.codes)
    assert item.question.ids.tolist() == [*before.question.ids.tolist(), *backbone.begin_image]
    assert int((item.labels != IGNORED).sum()) == int((before.labels != IGNORED).sum()) - len(backbone.begin_image)
    torch.testing.assert_close(backbone.output([item]).image_pred, plain.output([before]).image_pred)
    read_only = samples(data, "VQAv2", "test")[0]
    answer, drawn = backbone.generate([read_only, question], 3)
    assert (answer.text, drawn.text) == (plain.generate([read_only], 3)[0].text, "")
    assert answer.image is None
    assert drawn.image.shape == (backbone.side, backbone.side, 3)
    loss = backbone.loss([item])
    assert torch.isfinite(loss.total)
    assert loss.tokens == 16 + int((item.labels != IGNORED).sum())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0\.0; sample=false"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"guidance": 0.5}, r"guidance must be at least 1 and finite, got 0\.5"),
    ],
    ids=["no temperature", "nan", "top_k", "guidance"],
)
def test_bad_options_are_named_before_loading(folder: Path, option: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.load(folder.name).load("cpu", None, **option)


def test_codes_equal_those_of_the_vq_model(load: Load, data: Path, tmp_path: Path) -> None:
    """Of the middle square of the picture wanted, resized to what is written; they decode to its size."""
    backbone = load()
    path = tmp_path / "wide.png"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (24, 48, 3), generator=generator, dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(path)
    Image.fromarray(noise[:, 12:36]).save(tmp_path / "middle.png")
    items = [
        backbone.encode([Sample("", (Turn("draw"),), target_image=file)])[0] for file in (path, tmp_path / "middle.png")
    ]
    codes = items[0].codes[items[0].codes != IGNORED]
    assert torch.equal(codes, items[1].codes[items[1].codes != IGNORED])
    assert len(codes.unique()) > 2
    with Image.open(tmp_path / "middle.png") as image:
        square = backbone.image_processor(
            images=image.resize((backbone.side,) * 2, Image.Resampling.BICUBIC), return_tensors="pt"
        )["pixel_values"]
    size = {"image_sizes": torch.tensor([square.shape[-2:]])} if backbone.name == "emu3" else {}
    encoded = backbone.vq.encode(square, **size)
    found = getattr(encoded, "image_tokens", encoded)
    found = found[2] if isinstance(found, tuple) else found[0] if isinstance(found, list) else found
    assert torch.equal(found.flatten(), codes)
    assert backbone._images(codes[None])[0].shape == (backbone.side, backbone.side, 3)


def test_question_features_and_choices(load: Load, data: Path) -> None:
    """The state and the logits where the answer begins; neither depends on the answer or the target."""
    backbone = load()
    several = samples(data, "HQEdit")[:3]
    asked = [Sample("", (Turn(sample.turns[0].instruction, "no"),), sample.image) for sample in several]
    found = backbone.question_features(backbone.encode(several))
    torch.testing.assert_close(backbone.question_features(backbone.encode(asked)), found)
    choices = backbone.choice_logits(several, ["a", "b"])
    for sample, features, logits in zip(several, found, choices, strict=True):
        ids = [*stock.prompt(backbone, sample), *backbone.text_ids(" ")]
        with torch.no_grad():
            every, _ = stock.step(backbone, ids, stock.pixels(backbone, sample.image))
            first, _ = stock.step(backbone, ids[:-1], stock.pixels(backbone, sample.image))
        torch.testing.assert_close(backbone.model.lm_head(features), first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            logits, every[[backbone.text_ids("a")[0], backbone.text_ids("b")[0]]], rtol=1e-4, atol=1e-4
        )
    assert backbone.question_features([]).shape == (0, 32)


def test_bfloat16_keeps_the_vq_model_in_float32(load: Load, data: Path) -> None:
    """Autocast changes no code; all parameters are frozen; what a worker prepares can be sent."""
    full, half = load(), load(dtype=torch.bfloat16, device_map="auto", checkpointing=True)
    full.vq.load_state_dict(half.vq.state_dict())
    sample = samples(data, "HQEdit")[0]
    prepared = pickle.loads(pickle.dumps(half.prepare(sample)))
    with torch.autocast("cpu", torch.bfloat16):
        item = half.encode_prepared([prepared])[0]
        loss = half.loss([item])
        assert always_draws(half).generate([sample], 2)[0].image.dtype.name == "uint8"
    assert torch.equal(item.codes, full.encode([sample])[0].codes)
    assert torch.isfinite(loss.total)
    assert {p.dtype for p in half.vq.parameters()} == {torch.float32}
    assert {p.dtype for p in half.language_model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in half.parameters())
    assert half.model.config._attn_implementation == "sdpa"
    assert not any(part.training for name in half.frozen for part in getattr(half.train().model.model, name).modules())


def test_checkpointing_changes_no_gradient(load: Load, data: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        backbone = load(checkpointing=checkpointing).train()
        weight = backbone.language_model.layers[0].self_attn.q_proj.weight.requires_grad_()
        backbone.loss(backbone.encode(samples(data, "HQEdit")[:2])).total.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_connections_and_released_extras(load: Load) -> None:
    backbone = load()
    found = {name.split("model.", 1)[1] for name in backbone.released_extras()}
    inner = "language_model" if backbone.name == "janus" else "text_model"
    norms = [f"model.{inner}.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")]
    assert found == {"lm_head.weight", f"model.{inner}.embed_tokens.weight", f"model.{inner}.norm.weight", *norms}
    parts = {name.split(".")[2] for name in backbone.connections()}
    wanted = {"aligner", "generation_aligner", "generation_embeddings", "generation_head"}
    assert parts == (wanted if backbone.name == "janus" else set())


def test_files_and_sizes_are_known_without_loading(load: Load, folder: Path, tmp_path: Path) -> None:
    backbone, kind = load(), backbones.load(folder.name)
    assert kind.check(folder) == [folder / "model.safetensors"]
    shutil.copy(folder / "config.json", tmp_path)
    sizes = kind.meta(tmp_path)
    assert sizes.device.type == "meta"
    assert {n: p.shape for n, p in sizes.named_parameters()} == {n: p.shape for n, p in backbone.named_parameters()}
    for make in (kind.meta, kind.load):
        with pytest.raises(UserError, match=r"no weights given: expected a folder with .* --weights"):
            make()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has adapter_config\.json, an adapter that transformers applies"):
        kind.check(tmp_path)


def test_bad_images_and_long_sequences_are_named(load: Load, tmp_path: Path) -> None:
    backbone, broken = load(), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for path, message in ((broken, "broken.png cannot be read"), (tmp_path / "none.png", "none.png cannot be read")):
        with pytest.raises(UserError, match=message):
            backbone.prepare(Sample("", (Turn("what?", "red"),), path))
    with pytest.raises(UserError, match=r"file.json#3 is 1,\d\d\d tokens long, .* reads 1,024 at most"):
        backbone.prepare(Sample("", (Turn("what? " * 200, "red"),), origin="file.json#3"))


@pytest.mark.parametrize("size", [(40, 1), (40, 3), (1, 1), (3, 3), (1, 40)])
def test_thin_images_keep_their_colors(size: tuple[int, int], load: Load, tmp_path: Path) -> None:
    """Of an image one or three pixels high the processor alone takes the rows for channels."""
    for name, each in (("thin.png", size), ("square.png", (40, 40))):
        Image.new("RGB", each, (255, 0, 0)).save(tmp_path / name)
    backbone = load()
    thin, square = (backbone.pixels(tmp_path / name).flatten(1) for name in ("thin.png", "square.png"))
    assert torch.allclose(thin[0].max(), square[0].max())
    assert torch.allclose(thin[1:].amin(1), square[1:].amin(1))


def test_too_long_samples_are_found_without_decoding(load: Load, tmp_path: Path) -> None:
    """At the limit to the token, with and without images."""
    backbone = load()
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    config: Any = backbone.language_model.config
    for read, written in product((None, tmp_path / "a.png"), repeat=2):
        sample = Sample("", (Turn("what?", "red"),), read, written, origin="file.json#3")
        length = len(backbone.prepare(sample))
        backbone.check_length(sample)
        config.max_position_embeddings, before = length - 1, config.max_position_embeddings
        for ask in (backbone.prepare, backbone.check_length):
            with pytest.raises(UserError, match=rf"json#3 is {length} tokens long, .* reads {length - 1} at most"):
                ask(sample)
        config.max_position_embeddings = before


def test_images_that_are_too_long_for_a_backbone(load: Load, tmp_path: Path) -> None:
    backbone = load()
    for size in ((8, 1820), (2000, 1)):
        Image.new("RGB", size).save(tmp_path / "long.png")
        sample = Sample("", (Turn("what?", "red"),), tmp_path / "long.png")
        if backbone.name == "emu3":
            assert "reads none with one side over 200 times the other" in backbone.unmet_need(size)
            with pytest.raises(UserError, match=r"long\.png cannot be resized for emu3"):
                backbone.prepare(sample)
        else:
            assert not backbone.unmet_need(size)
            backbone.prepare(sample)
    assert not backbone.unmet_need((1, 200))
