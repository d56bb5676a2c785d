"""Readers of the paper's files, and errors that name file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from cnext.tasks import formats
from cnext.tasks.base import DataError, Task

CONVERSATION = Task(
    "VQAv2", ("text", "image"), ("text",), "conversation", "short_answer", "*.jsonl", "test.json", "images", "images"
)
GENERATION = Task(
    "Flickr30k", ("text",), ("image",), "generation", "clip_text", "*.jsonl", "test.json", "images", "images"
)
EDITING = Task(
    "HQEdit", ("text", "image"), ("image",), "editing", "clip_image", "*.jsonl", "test.json", "images", "images"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.fromarray(numpy.zeros((4, 6, 3), numpy.uint8)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:40])
    return tmp_path


def write(root: Path, rows: list[Any], name: str = "train.jsonl") -> None:
    text = (
        json.dumps(rows)
        if name.endswith(".json")
        else "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
    )
    (root / name).write_text(text)


def test_multi_turn_training_conversation(root: Path) -> None:
    write(root, [{"image": "a.png", "data": ["q1", "a1", "q2", "a2"]}])
    (sample,) = formats.read_samples(CONVERSATION, root, "train")
    assert [(turn.instruction, turn.answer) for turn in sample.turns] == [("q1", "a1"), ("q2", "a2")]
    assert sample.image == root / "images" / "a.png"
    assert sample.origin == f"{root / 'train.jsonl'}:1"


@pytest.mark.parametrize("key", ["question_id", "question id"])
def test_question_id_with_and_without_space(root: Path, key: str) -> None:
    write(root, [{key: 17, "image": "a.png", "text": "q", "answer": "a"}], "test.json")
    assert formats.read_samples(CONVERSATION, root, "test")[0].id == "17"


@pytest.mark.parametrize("space", ["_", " "], ids=["underscore", "space"])
def test_source_image_with_and_without_space(root: Path, space: str) -> None:
    write(root, [{f"source{space}image": "a.png", f"target{space}image": "b.jpg", "instruction": "do"}], "test.json")
    (sample,) = formats.read_samples(EDITING, root, "test")
    assert (sample.image, sample.target_image) == (root / "images/a.png", root / "images/b.jpg")


def test_generation_test_rows_need_no_image(root: Path) -> None:
    write(root, [{"question_id": 1, "text": "Please generate the image: a dog"}], "test.json")
    assert formats.read_samples(GENERATION, root, "test")[0].target_image is None


GOOD = {"image": "a.png", "data": ["q", "a"]}
BAD = {
    "not an object": ([1, 2], "must be a JSON object, got list"),
    "not JSON": ("{oops", "is not JSON"),
    "key twice": ('{"image": "a.png", "data": ["q", "a"], "data": 1}', "has the key 'data' twice in one object"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "PDF": ({"image": "book.PDF", "data": ["q", "a"]}, "names a PDF, which is not read: book.PDF"),
    "no text": ({"image": "a.png"}, "lacks the key 'answer'"),
    "odd turns": ({"image": "a.png", "data": ["q"]}, "even number of strings"),
    "turn not text": ({"image": "a.png", "data": ["q", 3]}, "even number of strings"),
    "image not text": ({"image": 5, "data": ["q", "a"]}, "'image' must be a string"),
    "missing image": ({"image": "c.png", "data": ["q", "a"]}, "names an image that is missing: "),
    "broken image": ({"image": "broken.png", "data": ["q", "a"]}, "names an image that is broken ("),
    "path upwards": ({"image": "../secret.png", "data": ["q", "a"]}, "leaves the image folder"),
    "path hidden": ({"image": "x/../../secret.png", "data": ["q", "a"]}, "leaves the image folder"),
    "absolute path": ({"image": "/etc/hostname", "data": ["q", "a"]}, "leaves the image folder"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_rows_name_file_line_and_reason(root: Path, row: Any, reason: str) -> None:
    (root / "secret.png").write_bytes((root / "images" / "a.png").read_bytes())
    write(root, [GOOD, row, GOOD])
    with pytest.raises(DataError) as error:
        formats.read_samples(CONVERSATION, root, "train")
    assert f"{root / 'train.jsonl'}:2: " in str(error.value)
    assert reason in str(error.value)


def test_what_is_said_of_a_long_row_is_short(root: Path) -> None:
    write(root, [{"image": "a.png", "k" * 200_000: 1}, {"image": "x" * 200_000, "data": ["q", "a"]}, "y" * 200_000])
    with pytest.raises(DataError) as error:
        formats.read_samples(CONVERSATION, root, "train")
    assert len(str(error.value)) < 4000


def test_all_bad_rows_are_named_at_once(root: Path) -> None:
    write(root, [row for row, _ in BAD.values()])
    with pytest.raises(DataError) as error:
        formats.read_samples(CONVERSATION, root, "train")
    lines = str(error.value).splitlines()
    assert lines[0] == f"task VQAv2: {len(BAD)} unusable rows"
    assert len(lines) == 1 + len(BAD)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}', "must hold one JSON list"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"[1,", "is not JSON"),
        (b"[]", "no test samples"),
    ],
    ids=["object", "bytes", "cut", "empty"],
)
def test_bad_test_files(root: Path, content: bytes, reason: str) -> None:
    (root / "test.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        formats.read_samples(CONVERSATION, root, "test")


def test_limit_takes_the_first(root: Path) -> None:
    write(root, [GOOD, {"image": "b.jpg", "data": ["q", "a"]}, "{oops"])
    assert [s.image.name for s in formats.read_samples(CONVERSATION, root, "train", 2)] == ["a.png", "b.jpg"]


def test_a_link_inside_the_image_folder_may_point_outside(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk")
    (root / "images" / "a.png").rename(elsewhere / "a.png")
    (root / "images" / "disk").symlink_to(elsewhere)
    write(root, [{"image": "disk/a.png", "data": ["q", "a"]}])
    assert formats.read_samples(CONVERSATION, root, "train")[0].image == root / "images" / "disk" / "a.png"
