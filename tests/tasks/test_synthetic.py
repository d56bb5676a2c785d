"""The synthetic suite: disjoint splits, the paper's formats, and equal bytes from equal seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy
import pytest
from PIL import Image
from pretraining import corpus

from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.tasks import formats, generated, scenes, suites, synthetic

SPLITS = ("train", "test", "validation")
TASKS = list(synthetic.EXAMPLES)


def samples(data: Path, task: str, split: str) -> list:
    return formats.read_samples(suites.load("next-tiny").task(task), data, split)


def disjoint(sets: list[set]) -> bool:
    return not any(one & other for one, other in itertools.combinations(sets, 2))


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_by_content(task: str) -> None:
    drawn = [itertools.islice(synthetic.examples(task, split), 400) for split in (*SPLITS, "pretrain")]
    assert disjoint([{example.content for example in examples} for examples in drawn])


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_read_and_disjoint_by_pixels(data: Path, task: str) -> None:
    """No picture of one split has the bytes of another's (Flickr30k: no caption recurs, for that is what is read)."""

    def identity(sample) -> object:
        return (
            sample.turns[0].instruction if sample.image is None else hashlib.sha256(sample.image.read_bytes()).digest()
        )

    found = [samples(data, task, split) for split in SPLITS]
    assert [len(rows) for rows in found] == [32, 8, 8]
    assert disjoint([{identity(sample) for sample in rows} for rows in found])


def test_no_task_has_the_held_out_skills_and_pretraining_has_them(data: Path) -> None:
    """Wordings of the pretraining corpus alone; test and validation share nothing; words have no image."""
    skills = {split: list(itertools.islice(synthetic.examples("Skills", split), 300)) for split in SPLITS[1:]}
    assert disjoint([{one.content for one in examples} for examples in skills.values()])
    first = {one.instruction.split()[0] for examples in skills.values() for one in examples}
    assert first == {"Read", "Say:", "Short:", "Tell"}
    for task in TASKS:
        asked = itertools.islice(synthetic.examples(task, "train"), 300)
        assert not first & {one.instruction.split()[0] for one in asked}
    trained = itertools.islice(corpus.corpus(0, 0.0), 2000)
    known = {(question, len(answer.split())) for question, answer, _, _ in trained if not question.startswith("Say")}
    assert {
        (one.instruction, len(one.answer.split()))
        for one in skills["test"]
        if not one.instruction.startswith("Say") and not re.search("of|at", one.instruction)
    } <= known
    read = samples(data, "Skills", "test")
    assert [sample.image is None for sample in read] == [sample.turns[0].instruction[:3] == "Say" for sample in read]
    assert suites.load("next-tiny").task("Skills").splits == ("test", "validation")


def test_same_seed_same_bytes(data: Path, tmp_path: Path) -> None:
    again = synthetic.write_next_tiny(tmp_path / "again", 32, 8)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((data / path).read_bytes() == (again / path).read_bytes() for path in files)


def test_a_smaller_suite_is_a_prefix_of_a_larger(data: Path, tmp_path: Path) -> None:
    small = synthetic.write_next_tiny(tmp_path / "small", 5, 2)
    for task in TASKS:
        assert [s.turns for s in samples(small, task, "train")] == [s.turns for s in samples(data, task, "train")][:5]


def test_another_seed_gives_other_samples() -> None:
    first, second = (next(synthetic.examples("VQAv2", "train", seed)) for seed in (0, 1))
    assert first.picture != second.picture


def test_boxes_fit_the_shapes() -> None:
    """Every box holds all the pixels of its color, and they reach its edges."""
    for example in itertools.islice(synthetic.examples("RefCOCO", "train"), 50):
        thing = next(t for t in example.picture.things if t.box == example.box)
        pixels = scenes.draw(example.picture).astype(int)
        rows, columns = numpy.nonzero((abs(pixels - scenes.COLORS[thing.color]).sum(-1)) < 20)
        x1, y1, x2, y2 = thing.box
        assert x1 - 1 <= columns.min()
        assert columns.max() <= x2 + 1
        assert y1 - 1 <= rows.min()
        assert rows.max() <= y2 + 1
        assert columns.max() - columns.min() > 0.6 * (x2 - x1)


def test_edits_change_what_they_say() -> None:
    for example in itertools.islice(synthetic.examples("HQEdit", "train"), 80):
        before, after = (len(picture.things) for picture in (example.picture, example.target))
        word = example.instruction.removeprefix(synthetic.DRAW).split()[0]
        assert after - before == {"Change": 0, "Turn": 0, "Remove": -1, "Add": 1}[word]
        assert (scenes.draw(example.picture) != scenes.draw(example.target)).any()


def test_paper_formats(data: Path) -> None:
    """Key names of the released files."""
    line = json.loads((data / "VQAv2/annotations/train_001.jsonl").read_text().splitlines()[0])
    assert set(line) == {"image", "data"}
    for task, keys in {
        "VQAv2": {"question_id", "image", "text", "answer"},
        "RefCOCO": {"question_id", "image", "text", "size", "origin_answer_bbox", "answer_bbox"},
        "Flickr30k": {"question_id", "image", "text"},
        "HQEdit": {"source_image", "target_image", "instruction"},
    }.items():
        assert set(json.loads((data / task / "questions/test.json").read_text())[0]) == keys
    with Image.open(data / "ImageNet/images/test/00000.png") as image:
        assert (image.size, image.mode) == ((48, 48), "RGB")


def test_every_word_is_in_the_vocabulary() -> None:
    """Only the words to be read are spelled; all others are tokens of their own."""
    tokenizer = TinyTokenizer()
    for task in TASKS:
        for example in itertools.islice(synthetic.examples(task, "train"), 200):
            spelled = [
                tokenizer.tokens[i] for i in tokenizer.encode(example.instruction) if tokenizer.tokens[i][0] == "#"
            ]
            assert not spelled, example.instruction
    assert all(len(tokenizer.encode(word)) == 3 for word in scenes.WORDS)


def test_icons_differ() -> None:
    drawn = [
        scenes.draw(scenes.Icon(name, ("red", "blue"), (0, 0, 0), 24.0, 24.0, 18.0)).astype(int)
        for name in scenes.ICONS
    ]
    assert all(abs(one - other).mean() > 3 for one, other in itertools.combinations(drawn, 2))


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(generated, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        synthetic.write_next_tiny(tmp_path / "data", 2, 2)
    assert list(tmp_path.iterdir()) == []
