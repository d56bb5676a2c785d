"""The suite next-real: real pictures with licenses, disjoint splits, wordings, boxes, and metadata that others read."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from random import Random

import numpy
import pytest

from cnext import backbones
from cnext.cli import main
from cnext.tasks import cached_folders, formats, generated, suites
from cnext.tasks.base import caption_of
from cnext.tasks.next_real import examples, material, pictures
from cnext.tasks.next_real.wordings import WORDINGS

SUITE = suites.load("next-real")
TASKS = list(examples.TASKS)
SPLITS = ("train", "test", "validation")
KINDS = {
    "VQAv2": ("what", "count", "side", "which", "exists"),
    "ImageNet": ("class",),
    "Flickr30k": ("one", "beside", "above"),
    "OCRVQA": ("word", "number"),
    "RefCOCO": ("box",),
    "HQEdit": ("replace", "recolor", "move"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.GENERATOR.write(tmp_path_factory.mktemp("real") / "data", 24, 12)


def some(task: str, split: str, count: int = 300) -> list[generated.Example]:
    return list(itertools.islice(examples.examples(task, split), count))


def disjoint(sets: list[set]) -> bool:
    return not any(one & other for one, other in itertools.combinations(sets, 2))


def test_the_material_is_what_its_record_says_and_every_part_has_a_license() -> None:
    found = material.sources()
    assert len(material.things()) == len(set(material.things())) == 100
    assert material.styles() == ("noto", "twemoji", "fluent")
    assert len(material.fonts()) == 8
    assert len(material.digit_labels()) == 1797
    parts = [*found["styles"], *found["photographs"], *found["fonts"], found["digits"]]
    allowed = {"Apache-2.0", "CC-BY-4.0", "CC-BY-2.0", "MIT", "CC0-1.0", "OFL-1.1", "LicenseRef-public-domain"}
    assert {part["license"] for part in parts} <= allowed
    written = (material.FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    assert all(part["name"] in written for part in (*found["styles"], *found["photographs"], *found["fonts"]))


def test_every_drawing_differs_and_is_visible() -> None:
    seen = set()
    for thing, style in itertools.product(material.things(), material.styles()):
        drawing = numpy.asarray(material.drawing(thing, style, 40))
        x1, y1, x2, y2 = material.extent(thing, style, 40)
        assert max(x2 - x1, y2 - y1) >= 34
        assert (drawing[..., 3] > 64).mean() > 0.08
        seen.add(hashlib.sha256(drawing.tobytes()).digest())
    assert len(seen) == 300


def test_photographs_words_and_handwritten_digits_belong_to_one_split() -> None:
    photographs = [set(material.photographs(split)) for split in (*SPLITS, "pretrain")]
    assert disjoint(photographs)
    assert all(len(names) >= 3 for names in photographs)
    assert disjoint([set(examples.words_of(split)) for split in (*SPLITS, "pretrain")])
    assert disjoint([set(examples.digits_of(split)) for split in (*SPLITS, "pretrain")])
    assert len(set(pictures.WORDS)) == len(pictures.WORDS) > 300


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_by_content_and_by_photograph(task: str) -> None:
    drawn = [some(task, split) for split in (*SPLITS, "pretrain")]
    assert disjoint([{example.content for example in part} for part in drawn])
    shown = [{example.picture.ground.photograph for example in part} - {""} for part in drawn]
    assert disjoint(shown)
    assert all(shown) or task == "Flickr30k"


@pytest.mark.parametrize("task", TASKS)
def test_reworded_has_the_test_items_in_wordings_that_training_lacks(task: str) -> None:
    test, reworded = some(task, "test"), some(task, "reworded")
    assert [(one.picture, one.target, one.box) for one in test] == [
        (one.picture, one.target, one.box) for one in reworded
    ]
    if task != "Flickr30k":
        assert [one.answer for one in test] == [one.answer for one in reworded]
    known = [wording for kind in KINDS[task] for wording in WORDINGS[kind][0]]
    other = [wording for kind in KINDS[task] for wording in WORDINGS[kind][1]]
    assert len(known) >= 8
    assert len(other) >= 4
    assert not {*known} & {*other}
    trained = {asked(one) for one in some(task, "train", 1500)}
    assert not trained & {asked(one) for one in reworded}


def asked(example: generated.Example) -> str:
    """The wording: what is asked without the names in it."""
    text = example.answer if example.instruction == generated.DRAW else example.instruction
    names = sorted({*material.things(), *pictures.TINTS, *pictures.GROUNDS, *pictures.PLACES}, key=len, reverse=True)
    text = re.sub(rf"\b({'|'.join(names)})\b", "*", text.lower())
    return re.sub(r"\b(a|an|some) \*", "*", text)


def test_answers_are_true_of_what_is_shown() -> None:
    for example in some("VQAv2", "test", 400):
        things, question = {thing.name: thing for thing in example.picture.things}, example.instruction
        named = [
            name for name in material.things() if re.search(rf"\b{name}\b", question.removesuffix(generated.SHORT))
        ]
        if example.answer in ("yes", "no"):
            assert (example.answer == "yes") == (named[0] in things)
        elif example.answer.isdecimal():
            assert int(example.answer) == len(example.picture.things)
        elif (
            "left" in question.lower().split("top")[0] and "top left" not in question and "bottom left" not in question
        ):
            other = things[next(name for name in named if name != example.answer)]
            assert things[example.answer].x < other.x
        else:
            assert example.answer in things


@pytest.mark.parametrize("style", material.styles())
def test_boxes_are_around_what_is_drawn(style: str) -> None:
    rng = Random(style)
    for name in rng.sample(material.things(), 30):
        thing = pictures.random_thing(rng, name, rng.choice(list(pictures.PLACES)), style)
        ground = pictures.Ground("mint")
        pixels = pictures.draw(pictures.Scene((thing,), ground)).astype(int)
        changed = (abs(pixels - pictures.GROUNDS["mint"]).sum(-1) > 24).nonzero()
        x1, y1, x2, y2 = thing.box
        for found, edge in zip(
            (*(side.min() for side in changed), *(side.max() + 1 for side in changed)), (y1, x1, y2, x2), strict=True
        ):
            assert abs(found - edge) <= 3, (name, style)


def test_an_edit_changes_one_thing() -> None:
    for example in some("HQEdit", "test", 200):
        before, after = example.picture.things, example.target.things
        assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
        assert example.picture.ground == example.target.ground
        assert (pictures.draw(example.picture) != pictures.draw(example.target)).any()
        assert len({thing.place for thing in after}) == len(after)


def test_texts_can_be_read_within_the_picture() -> None:
    for example in some("OCRVQA", "train", 300):
        assert example.answer == "".join(symbol for symbol, _, _ in example.picture.symbols)
        assert all(0 < x < 96 and 0 < y < 96 for _, x, y in example.picture.symbols)
    assert {example.answer.isdecimal() for example in some("OCRVQA", "test", 60)} == {True, False}


def test_the_default_has_400_items_of_every_split_and_task() -> None:
    recipe = SUITE.budgets["default"]
    assert recipe.test_samples >= 400
    assert SUITE.backbone == "small"
    assert all(task.splits == ("train", "test", "validation", "reworded") for task in SUITE.tasks)


def test_files_are_read_and_equal_seeds_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    for task in SUITE.tasks:
        counts = [len(formats.read_samples(task, folder, split)) for split in task.splits]
        assert counts == [24, 12, 12, 12]
    again = examples.GENERATOR.write(tmp_path / "again", 24, 12)
    assert cached_folders.digest(again) == cached_folders.digest(folder)
    other = examples.GENERATOR.write(tmp_path / "other", 24, 12, seed=1)
    assert cached_folders.digest(other) != cached_folders.digest(folder)


def test_the_suite_passes_its_own_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder), "--suite", "next-real", "--backbone", "small"]) == 0, capsys.readouterr()


def test_captions_are_what_the_scorer_reads(folder: Path) -> None:
    task = SUITE.task("Flickr30k")
    samples = formats.read_samples(task, folder, "test")
    captions = [caption_of(sample.turns[0].instruction) for sample in samples]
    assert captions == [example.answer for example in some("Flickr30k", "test", 12)]


def test_every_word_of_the_suite_has_a_token_and_words_to_read_are_spelled() -> None:
    tokenizer = backbones.load("small").new_tokenizer()
    for task, split in itertools.product(TASKS, ("train", "reworded")):
        for example in some(task, split):
            ids = tokenizer.encode(example.instruction + (" " + example.answer if task != "OCRVQA" else ""))
            assert not [tokenizer.tokens[i] for i in ids if tokenizer.tokens[i].startswith("#")], example
    assert tokenizer.decode(tokenizer.encode("harp")) == "harp"


def test_generate_writes_the_files_with_croissant_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "real"
    assert main(["data", "generate", "--suite", "next-real", "--preset", "smoke", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    found = json.loads((out / "croissant.json").read_text(encoding="utf-8"))
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    files = {one["@id"]: one for one in found["distribution"]}
    for name, one in files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == one["sha256"]
    assert len(files) == 6 * 4 + 2
    records = {one["@id"]: one for one in found["recordSet"]}
    assert "480 items to train on" in records["VQAv2/train"]["description"]
    assert {field["name"] for field in records["VQAv2/test"]["field"]} == {"question_id", "image", "text", "answer"}
    assert found["license"]
    assert main(["data", "generate", "--out", str(out)]) == 2
    assert "does; give another --out" in capsys.readouterr().err
    assert main(["data", "generate", "--suite", "ucit", "--out", str(tmp_path / "x")]) == 2
    assert "valid: next-tiny, next-real" in capsys.readouterr().err
