"""The official files of the six tasks: layout, keys, image folders, prompts and image positions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tasks.official import SHORT, lines, listing, picture, write_continual_next

from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.scoring.images import caption_of
from cnext.tasks import formats, suites
from cnext.tasks.base import DataError, Sample, Turn
from cnext.training.evaluation import question
from cnext.training.setup import read_suite

SUITE = suites.load("continual-next")
TASKS = [task.name for task in SUITE.tasks]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_continual_next(tmp_path_factory.mktemp("official"))


def read(data: Path, name: str, split: str, **changes: Any) -> list[Sample]:
    return formats.read_samples(dataclasses.replace(SUITE.task(name), **changes), data, split)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_several_train_files_and_its_test_file(official: Path, name: str) -> None:
    train, test = read(official, name, "train"), read(official, name, "test")
    assert (len(train), len(test)) == (6, 3)
    assert {Path(sample.origin).name.split(":")[0] for sample in train} == {"output_001.jsonl", "output_002.jsonl"}
    assert len({sample.id for sample in train}) == 6


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("VQAv2", "SEED-Data-VQAv2/COCO2014/train2014", "SEED-Data-VQAv2/COCO2014/val2014"),
        ("ImageNet", "SEED-Data-ImageNet/imagenet/train/n0", "SEED-Data-ImageNet/imagenet/val/n6"),
        ("RefCOCO", "SEED-Data-Grounding/COCO2014/train2014", "SEED-Data-Grounding/COCO2014/train2014"),
        ("HQEdit", "SEED-Data-HQEdit/images/source_images", "SEED-Data-HQEdit/images/source_images"),
    ],
)
def test_image_roots_of_train_and_test(official: Path, name: str, train: str, test: str) -> None:
    assert read(official, name, "train")[0].image.parent == official / train
    assert read(official, name, "test")[0].image.parent == official / test


def test_turns_boxes_and_captions(official: Path) -> None:
    first = read(official, "VQAv2", "train")[0]
    assert [turn.answer for turn in first.turns] == ["net", "orange"]
    box = read(official, "RefCOCO", "test")[0]
    assert (box.turns[0].answer, box.size, box.id) == ("[0.12,0.25,0.50,0.62]", (8, 6), "6")
    drawn = read(official, "Flickr30k", "train")[0]
    assert (drawn.turns[0].instruction, drawn.image) == ("Please generate the image. Two cats 0.", None)
    assert drawn.target_image.name == "000000000000.jpg"


@pytest.mark.parametrize(("name", "asked"), [("VQAv2", False), ("Flickr30k", True), ("HQEdit", True)])
def test_a_question_says_whether_an_image_is_asked_for(official: Path, name: str, asked: bool) -> None:
    """Captions of a test have no target to tell it by."""
    for split in ("train", "test"):
        for sample in read(official, name, split):
            assert sample.draws == question(sample).asks_image == asked
            assert question(sample).target_image is None
    assert read(official, "Flickr30k", "test")[0].target_image is None


def test_consistent_prompts_are_alike_in_train_and_test(official: Path) -> None:
    """The released evaluation asks Flickr30k with a second prefix, which the score does not see."""
    test = read(official, "Flickr30k", "test")[0]
    assert test.turns[0].instruction == "Please generate the image: A dog 6."
    assert question(test).turns[0].instruction == "Generate an image: Please generate the image: A dog 6."
    edits = [read(official, "HQEdit", split)[0].turns[0].instruction for split in ("train", "test")]
    assert edits == ["Add a hat 0.", "Please generate the image: Add a hat 6."]

    for name in ("Flickr30k", "HQEdit"):
        for split in ("train", "test"):
            for sample in read(official, name, split, prompts="consistent"):
                instruction = sample.turns[0].instruction
                assert question(sample).turns[0].instruction == instruction
                assert instruction == f"Please generate the image: {caption_of(instruction)}"
    assert read(official, "VQAv2", "train", prompts="consistent") == read(official, "VQAv2", "train")


def test_random_image_position_depends_on_the_id(official: Path, tmp_path: Path) -> None:
    picture(tmp_path / "SEED-Data-VQAv2/COCO2014/train2014/a.jpg")
    rows = [{"image": "a.jpg", "data": [f"What is {index}?", "x"]} for index in range(400)]
    lines(tmp_path / "SEED-Data-VQAv2/annotations/output_001.jsonl", rows)
    first = {sample.id: sample.image_first for sample in read(tmp_path, "VQAv2", "train")}
    assert 160 < sum(first.values()) < 240
    assert first == {sample.id: sample.image_first for sample in read(tmp_path, "VQAv2", "train")}
    places = "".join("AB"[first[f"VQAv2-train-{index:06d}"]] for index in range(16))
    assert places == "BAAAAABAAAABBABB", "other places than in earlier versions: a run would not be repeatable"
    assert all(sample.image_first for name in TASKS for sample in read(official, name, "test"))
    assert all(sample.image_first for sample in read(official, "VQAv2", "train", image_position="first"))


@pytest.mark.parametrize(("preset", "anew"), [("paper", False), ("released", True)])
def test_presets_say_whether_draws_are_made_anew(official: Path, preset: str, anew: bool) -> None:
    planned = plan(RunConfig(suite="continual-next", data=official, preset=preset, device="cpu"))
    samples = read_suite(planned, official)
    assert all(bool(one.redraws) == anew for listed in samples["train"].values() for one in listed)
    assert all(not one.redraws for listed in samples["test"].values() for one in listed)


@pytest.mark.parametrize(
    ("name", "redraws"),
    [
        ("VQAv2", ("image_first",)),
        ("Flickr30k", ("phrase",)),
        ("HQEdit", ("image_first", "phrase")),
    ],
)
def test_what_is_drawn_anew_in_every_epoch(official: Path, name: str, redraws: tuple[str, ...]) -> None:
    sample = formats.redrawn(read(official, name, "train")[0], SUITE.task(name))
    assert sample.redraws == redraws
    drawn = [sample.drawn(f"0/{name}/{epoch}") for epoch in range(64)]
    assert drawn == [sample.drawn(f"0/{name}/{epoch}") for epoch in range(64)]
    assert len({one.draw for one in drawn}) == (64 if "phrase" in redraws else 1)
    places = [one.image_first for one in drawn]
    assert 16 < sum(places) < 48 if "image_first" in redraws else all(places)
    same = dict.fromkeys(("image_first", "draw", "redraws"))
    assert {dataclasses.replace(one, **same) for one in drawn} == {dataclasses.replace(sample, **same)}
    assert not formats.redrawn(sample, dataclasses.replace(SUITE.task(name), image_position="first")).redraws or (
        "phrase" in redraws
    )
    said = dataclasses.replace(sample, turns=(Turn("Draw", "Here."),))
    assert "phrase" not in formats.redrawn(said, SUITE.task(name)).redraws


@pytest.mark.parametrize(
    "value", [{}, {"image": ""}, {"image": "none"}, {"image": None}, {"image": "null.jpg"}], ids=str
)
def test_a_row_without_an_image_is_text_alone(tmp_path: Path, value: dict[str, Any]) -> None:
    picture(tmp_path / "SEED-Data-VQAv2/COCO2014/train2014/a.jpg")
    rows = [{"image": "a.jpg", "data": ["q", "a"]}, {**value, "data": ["q", "a"]}]
    lines(tmp_path / "SEED-Data-VQAv2/annotations/output_001.jsonl", rows)
    assert [sample.image is None for sample in read(tmp_path, "VQAv2", "train")] == [False, True]


def test_a_task_that_reads_images_needs_some(tmp_path: Path) -> None:
    lines(tmp_path / "SEED-Data-VQAv2/annotations/output_001.jsonl", [{"data": ["q", "a"]}])
    with pytest.raises(DataError, match=r"VQAv2 reads images, and none of its 1 rows .* names one"):
        read(tmp_path, "VQAv2", "train")


OLD, NEW, RESPONSE = {"instruction": "old"}, {"instruction_new": "new"}, {"response": "Here it is."}


@pytest.mark.parametrize(
    ("row", "released", "ours"),
    [
        (OLD, ("old", "", ""), ("old", "")),
        (OLD | RESPONSE, ("old", "", ""), ("old", "Here it is.")),
        (OLD | NEW | RESPONSE, ("old", "", ""), ("new", "Here it is.")),
        (NEW | RESPONSE, ("new", "Here it is.", None), ("new", "Here it is.")),
        (NEW | {"response": ""}, ("new", "", None), ("new", "")),
        (NEW, ("new", "", ""), ("new", "")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_instructions_and_responses_of_edits(
    tmp_path: Path, row: dict[str, str], released: tuple[str, str, str | None], ours: tuple[str, str]
) -> None:
    """Of the suite, as the authors' code takes them: "instruction" first, and no phrase drawn for an empty response."""
    for side in ("source", "target"):
        picture(tmp_path / f"SEED-Data-HQEdit/images/{side}_images/a.jpg", size=(400, 400))
    sides = {"source image": "source_images/a.jpg", "target image": "target_images/a.jpg"}
    lines(tmp_path / "SEED-Data-HQEdit/annotations/output_001.jsonl", [sides | row])
    (sample,) = read(tmp_path, "HQEdit", "train")
    assert (sample.turns[0].instruction, sample.turns[0].answer, sample.draw) == released
    (sample,) = read(tmp_path, "HQEdit", "train", format="editing")
    assert (sample.turns[0].instruction, sample.turns[0].answer, sample.draw) == (*ours, "")


def test_an_edit_without_an_instruction(tmp_path: Path) -> None:
    lines(tmp_path / "SEED-Data-HQEdit/annotations/output_001.jsonl", [{"source_image": "a.jpg"}])
    with pytest.raises(DataError, match="lacks the key 'instruction'"):
        read(tmp_path, "HQEdit", "train")


@pytest.mark.parametrize(
    ("source", "target", "stays"),
    [
        ((400, 400), (400, 400), True),
        ((399, 500), (400, 400), False),
        ((400, 400), (500, 399), True),
        ((900, 900), (390, 390), True),
        ((1000, 600), (600, 1000), True),
        ((1000, 599), (400, 400), False),
        ((599, 1000), (400, 400), False),
        ((2000, 1200), (2000, 1200), True),
    ],
    ids=str,
)
def test_image_filter_of_editing_as_released(
    source: tuple[int, int], target: tuple[int, int], stays: bool, tmp_path: Path
) -> None:
    """Only the source is looked at."""
    sides = {"source": source, "target": target}
    for side, size in sides.items():
        picture(tmp_path / f"SEED-Data-HQEdit/images/{side}_images/b.png", size=size)
        picture(tmp_path / f"SEED-Data-HQEdit/images/{side}_images/a.png", size=(400, 400))
    rows = [{f"{side}_image": f"{side}_images/{name}.png" for side in sides} for name in "ab"]
    rows = [row | {"instruction": "add a hat"} for row in rows]
    lines(tmp_path / "SEED-Data-HQEdit/annotations/output_001.jsonl", rows)
    listing(tmp_path / "SEED-Data-HQEdit/questions/test.json", rows)
    assert len(read(tmp_path, "HQEdit", "train")) == 1 + stays
    assert len(read(tmp_path, "HQEdit", "train", image_filter="none")) == len(read(tmp_path, "HQEdit", "test")) == 2


def test_several_accepted_answers(tmp_path: Path) -> None:
    picture(tmp_path / "SEED-Data-VQAv2/COCO2014/a.jpg")
    row = {"question_id": 1, "image": "a.jpg", "text": SHORT, "answer": ["two", "2"]}
    listing(tmp_path / "SEED-Data-VQAv2/questions/test.json", [row])
    (sample,) = read(tmp_path, "VQAv2", "test")
    assert (sample.turns[0].answer, sample.answers) == ("two", ("two", "2"))


def test_a_missing_folder_names_what_exists(tmp_path: Path) -> None:
    (tmp_path / "SEED-Data-Fliackr30k").mkdir()
    with pytest.raises(DataError, match=r"no file matches .*SEED-Data-Flickr30k.*holds SEED-Data-Fliackr30k"):
        read(tmp_path, "Flickr30k", "train")


@pytest.mark.parametrize(
    ("field", "value"), [("prompts", "consistant"), ("image_position", "last"), ("image_filter", "some")]
)
def test_options_of_a_task_are_checked(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"unknown {field} of task VQAv2 '{value}'; valid: "):
        dataclasses.replace(SUITE.task("VQAv2"), **{field: value})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "a.jpg", "data": ["q", "\\ud800"]}', "is not Unicode text"),
        (f'{{"image": "a.jpg", "data": {"9" * 5000}}}', "is not JSON"),
    ],
    ids=["surrogate", "endless number"],
)
def test_rows_that_json_or_utf8_cannot_represent(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "SEED-Data-VQAv2/annotations/output_001.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=f"output_001.jsonl:1: {reason}"):
        read(tmp_path, "VQAv2", "train")
