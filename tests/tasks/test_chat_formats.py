"""Conversations as LLaVA and chat templates write them, and captions with several references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tasks.official import listing, picture

from cnext.tasks import formats, suites
from cnext.tasks.base import DataError, Sample, Task

LLAVA = Task("GQA", ("text", "image"), ("text",), "llava", "exact_answer", "train.json", "test.json", ".", ".")
MESSAGES = Task("any", ("text", "image"), ("text",), "messages", "exact_answer", "train.json", "test.json", ".", ".")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    return tmp_path


def one(root: Path, task: Task, row: dict[str, Any]) -> Sample:
    listing(root / "train.json", [row])
    return formats.read_samples(task, root, "train")[0]


def llava(*said: str, image: Any = "./a.png", speakers: tuple[str, ...] = ("human", "gpt")) -> dict[str, Any]:
    talk = [{"from": speakers[index % len(speakers)], "value": words} for index, words in enumerate(said)]
    return {"id": "7", "image": image, "conversations": talk}


def chat(*said: Any, images: Any = ("a.png",)) -> dict[str, Any]:
    speakers = ["user", "assistant"] * len(said)
    talk = [{"role": speaker, "content": words} for speaker, words in zip(speakers, said, strict=False)]
    return {"messages": talk, "images": list(images) if isinstance(images, tuple) else images}


@pytest.mark.parametrize(
    ("asked", "first"),
    [("<image>\nWhat?", True), ("What?\n<image>", False), ("What?", True), ("What <image>?", True)],
    ids=["before", "after", "no mark", "within"],
)
def test_image_position_of_the_placeholder(root: Path, asked: str, first: bool) -> None:
    sample = one(root, LLAVA, llava(asked, "A dog."))
    assert (sample.id, sample.image, sample.image_first) == ("7", root / "a.png", first)
    assert "<image>" not in sample.turns[0].instruction
    assert sample.turns[0].answer == "A dog."


def test_several_turns_and_no_image(root: Path) -> None:
    row = llava("q1", "a1", "q2", "a2")
    del row["image"]
    listing(root / "train.json", [row, llava("<image>\nq", "a")])
    text, _ = formats.read_samples(LLAVA, root, "train")
    assert text.image is None
    assert [(turn.instruction, turn.answer) for turn in text.turns] == [("q1", "a1"), ("q2", "a2")]


def test_test_rows_in_the_benchmarks_format(root: Path) -> None:
    listing(root / "test.json", [{"question_id": 3, "image": "b.png", "text": "What?", "answer": "dog"}])
    (sample,) = formats.read_samples(LLAVA, root, "test")
    assert (sample.id, sample.image, sample.turns[0].answer) == ("3", root / "b.png", "dog")


def test_messages_with_an_image_to_read_and_one_to_write(root: Path) -> None:
    sample = one(root, MESSAGES, chat("<image>Make it red.", "Done. <image>", images=("a.png", "b.png")))
    assert (sample.image, sample.target_image) == (root / "a.png", root / "b.png")
    assert (sample.turns[0].instruction, sample.turns[0].answer) == ("Make it red.", "Done.")


def test_messages_in_parts_and_with_a_system(root: Path) -> None:
    parts = [{"type": "text", "text": "What? "}, {"type": "image"}]
    row = chat(parts, [{"type": "text", "text": "A dog."}])
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    sample = one(root, MESSAGES, row)
    assert (sample.turns[0].instruction, sample.turns[0].answer) == ("Be brief.\nWhat?", "A dog.")
    assert not sample.image_first


BAD = {
    "no list": (LLAVA, {"image": "a.png", "conversations": "q"}, "lacks 'conversations', a list of objects"),
    "no answer": (LLAVA, llava("q"), "must alternate question, answer, question, answer, ...: got user"),
    "two questions": (LLAVA, llava("q", "q", speakers=("human",)), "must alternate .* got user, user"),
    "stranger": (LLAVA, llava("q", "a", speakers=("human", "bot")), "'from' must be one of human, .* got 'bot'"),
    "two marks": (LLAVA, llava("<image><image>q", "a"), "has 2 <image> for 1 images"),
    "mark alone": (LLAVA, llava("<image>q", "a", image=None), "has 1 <image> for 0 images"),
    "later mark": (LLAVA, llava("q", "a", "<image>q", "a"), "the first question may read one"),
    "two images": (
        MESSAGES,
        chat("<image><image>q", "a", images=("a.png", "b.png")),
        "has 2 images; the first question",
    ),
    "unmarked images": (MESSAGES, chat("q", "a", images=("a.png", "b.png")), "has 0 <image> for 2 images"),
    "image bytes": (MESSAGES, chat("q", "a", images=[{"bytes": "x"}]), "'images' must be a list of paths"),
    "leaves the folder": (MESSAGES, chat("q", "a", images=("../x.png",)), "'images' leaves the image folder"),
    "number said": (MESSAGES, chat(3, "a"), "a message must be a string or a list of parts, got int"),
    "part without text": (MESSAGES, chat([{"type": "text"}], "a"), "lacks the key 'text'"),
}


@pytest.mark.parametrize(("task", "row", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_conversations(root: Path, task: Task, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf"train\.json#0: .*{reason}"):
        one(root, task, row)


def test_captions_from_a_separate_file(tmp_path: Path) -> None:
    """UCIT's test rows have their references beside them: item k is image_id k, counted from 1."""
    task = suites.load("ucit").task("Flickr30k")
    picture(tmp_path / "datasets/Flickr30k/a.jpg")
    rows = [{"question_id": f"q{k}", "image": "Flickr30k/a.jpg", "text": "Caption?"} for k in (1, 2)]
    listing(tmp_path / task.test, rows)
    said = [{"image_id": k, "id": 10 * k + i, "caption": f"c{k}{i}"} for k in (1, 2) for i in (1, 2)]
    (tmp_path / task.references).write_text(json.dumps({"annotations": said}))
    assert [sample.references for sample in formats.read_samples(task, tmp_path, "test")] == [
        ("c11", "c12"),
        ("c21", "c22"),
    ]
    (tmp_path / task.references).write_text("[]")
    with pytest.raises(DataError, match=r"cannot read the captions .*val_coco_type_3000\.json"):
        formats.read_samples(task, tmp_path, "test")
