"""`cnext data check` finds every defect in data files, and only those."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tasks.official import SHORT, lines, listing, picture, write_continual_next
from training.toy import change

from cnext.cli import main, run_main
from cnext.errors import UserError
from cnext.tasks import data_check, data_check_text, suites
from cnext.tasks.base import DataError, ImageNeed, Sample, Suite, Turn, any_size
from cnext.training.setup import SKIP, check_lengths

TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
VQA = "SEED-Data-VQAv2"
IMAGES = f"{VQA}/COCO2014/train2014"


def suite(train: int = 6, test: int = 3) -> Suite:
    """The paper's suite with the counts of the small files."""
    full = suites.load("continual-next")
    small = tuple(dataclasses.replace(task, train_count=train, test_count=test) for task in full.tasks)
    return dataclasses.replace(full, tasks=small)


class Watch:
    """Records the progress."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []

    def begin(self, doing: str, total: int) -> None:
        self.steps.append([doing, total, 0])

    def advance(self, count: int) -> None:
        self.steps[-1][2] += count


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_continual_next(tmp_path / "data")


def check(data: Path, look: str = "verify", need: ImageNeed = any_size) -> data_check.Report:
    return data_check.check(suite(), data, Watch(), look, need)


def append(path: Path, *added: str) -> None:
    path.write_text(path.read_text() + "".join(line + "\n" for line in added))


def test_clean_files_are_clean(data: Path) -> None:
    report = check(data)
    assert report.problems == 0
    splits = [split for task in report.tasks.values() for split in task.splits.values()]
    assert [(split.files, split.rows) for split in splits] == [(2, 6), (1, 3)] * 6
    assert report.tasks["Flickr30k"].splits["test"].without_image == 3
    assert "no problems" in data_check_text.text(report)


def test_progress_reaches_the_total(data: Path) -> None:
    watch = Watch()
    data_check.check(suite(), data, watch)
    assert [doing for doing, _, _ in watch.steps[:3]] == ["VQAv2 train", "VQAv2 train images", "VQAv2 test"]
    assert all(done == total for _, total, done in watch.steps)


def test_rows_left_out_of_training_are_no_problems(data: Path) -> None:
    picture(data / "SEED-Data-HQEdit/images/source_images/000000000001.jpg", size=(480, 399))
    report = check(data)
    (line,) = report.tasks["HQEdit"].splits["train"].left_out
    assert "output_001.jsonl:2: " in line
    assert "000000000001.jpg is 480x399" in line
    assert report.problems == 0
    assert "HQEdit train: rows left out of training by the size of their image, as released" in data_check_text.text(
        report
    )
    assert all(not split.left_out for split in check(data, "none").tasks["HQEdit"].splits.values())


def test_every_malformed_row_is_named(data: Path) -> None:
    path = data / VQA / "annotations/output_002.jsonl"
    append(
        path,
        "{oops",
        "[1]",
        '{"image": "000000000000.jpg", "data": ["q"]}',
        '{"image": "../x.jpg", "data": ["q", "a"]}',
    )
    split = check(data).tasks["VQAv2"].splits["train"]
    reasons = ("is not JSON", "must be a JSON object, got list", "'data' must be a list", "leaves the image folder")
    assert [line.split(": ")[0] for line in split.malformed] == [f"{path}:{number}" for number in (3, 4, 5, 6)]
    assert all(reason in line for reason, line in zip(reasons, split.malformed, strict=True))
    assert split.miscounted
    assert split.problems == 5


def test_missing_and_broken_images_are_named_with_their_paths(data: Path) -> None:
    missing, broken = (data / IMAGES / f"{index:012d}.jpg" for index in (0, 5))
    missing.unlink()
    broken.write_bytes(b"no picture")
    split = check(data).tasks["VQAv2"].splits["train"]
    assert split.missing_images == [f"{missing}, named first by {data / VQA}/annotations/output_001.jsonl:1"]
    (line,) = split.broken_images
    assert line.startswith(f"{broken} (cannot identify image file")
    assert line.endswith(f"named first by {data / VQA}/annotations/output_002.jsonl:2")
    assert check(data, "none").problems == 0


@pytest.mark.parametrize("look", ["verify", "decode"])
def test_a_truncated_image_is_found(look: str, data: Path) -> None:
    path = data / IMAGES / "000000000003.jpg"
    Image.effect_noise((96, 96), 60).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (line,) = check(data, look).tasks["VQAv2"].splits["train"].broken_images
    assert "truncated" in line


def test_images_that_are_converted_are_counted(data: Path) -> None:
    one, two, three = (data / IMAGES / f"{index:012d}.jpg" for index in (0, 1, 2))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 6)).save(one, exif=exif)
    Image.new("LA", (8, 6), (0, 128)).save(two, "PNG")
    Image.new("RGBA", (8, 6), (0, 0, 0, 128)).save(three, "PNG", exif=exif)
    report = check(data, "decode")
    rows = f"named first by {data / VQA}/annotations/output_001.jsonl"
    assert report.tasks["VQAv2"].splits["train"].converted == {
        "turned by their orientation tag": [f"{one}, {rows}:1", f"{three}, {rows}:3"],
        "with transparency, put on white": [f"{two}, {rows}:2", f"{three}, {rows}:3"],
    }
    assert report.problems == 0
    shown = data_check_text.text(report)
    assert "VQAv2 train: images turned by their orientation tag (not counted as a problem): 2\n" in shown


def test_images_without_black_and_white_are_problems(data: Path) -> None:
    path = data / IMAGES / "000000000000.jpg"
    Image.new("F", (8, 6), 0.5).save(path, "TIFF")
    for look in ("verify", "decode"):
        (line,) = check(data, look).tasks["VQAv2"].splits["train"].broken_images
        assert line.startswith(f"{path} (it has floating-point pixels, ")


def test_what_a_backbone_needs_of_images_is_asked(data: Path) -> None:
    picture(data / IMAGES / "000000000001.jpg", size=(80, 1))
    report = check(data, need=lambda size: "too thin" if size[0] > 79 * size[1] else "")
    (line,) = report.tasks["VQAv2"].splits["train"].broken_images
    assert f"{IMAGES}/000000000001.jpg (80 x 1 pixels, too thin), named first by " in line
    assert report.problems == 1


def test_missing_files_and_folders_are_named_once(data: Path) -> None:
    (data / VQA / "questions/test.json").unlink()
    os.rename(data / VQA / "COCO2014", data / VQA / "elsewhere")
    train, test = check(data).tasks["VQAv2"].splits.values()
    owner = "COCO 2014, train2014 and val2014"
    assert train.lacking == [f"no image folder {data / IMAGES}; expected there: 6 images of {owner}"]
    assert (train.problems, train.missing_images) == (1, [])
    questions = data / VQA / "questions"
    expected = f"expected there: 3 rows from {suite().source}"
    assert test.lacking == [
        f"no file matches {questions}/test.json; {questions} holds nothing; {expected}",
        f"no image folder {data / VQA}/COCO2014; expected there: images of {owner}",
    ]
    assert (test.problems, test.miscounted) == (2, False)


def test_a_part_of_the_images_that_is_missing_is_named_with_its_source(data: Path) -> None:
    """Folders below the image folder, each once; an image that is missing in a folder that is there by itself."""
    shutil.rmtree(data / VQA / "COCO2014/val2014")
    shutil.rmtree(data / "SEED-Data-HQEdit/images/target_images")
    for index in (0, 1, 2):
        shutil.rmtree(data / f"SEED-Data-ImageNet/imagenet/train/n{index}")
    (data / IMAGES / "000000000000.jpg").unlink()
    for look in ("verify", "none"):
        report = check(data, look)
        train, test = report.tasks["VQAv2"].splits.values()
        missing = (
            f"no image folder {data / VQA}/COCO2014/val2014; expected there: 3 images of {suite().tasks[0].source}"
        )
        assert (train.lacking, test.lacking) == ([], [missing])
        assert (len(train.missing_images), len(test.missing_images)) == (look == "verify", 0)
        edits = [split.lacking for split in report.tasks["HQEdit"].splits.values()]
        targets = f"no image folder {data}/SEED-Data-HQEdit/images/target_images; expected there"
        assert edits == [[f"{targets}: 6 images of HQ-Edit"], [f"{targets}: 3 images of HQ-Edit"]]
        labels = report.tasks["ImageNet"].splits["train"]
        assert len(labels.lacking) == 3
        assert "ImageNet train: no image folder" in data_check_text.text(report)
        assert labels.unusable == {"missing image": 3}


def test_an_empty_folder_is_told_every_part_and_where_it_comes_from(tmp_path: Path) -> None:
    shown = data_check_text.text(data_check.check(suites.load("continual-next"), tmp_path, Watch()))
    for task in suites.load("continual-next").tasks:
        for split in task.splits:
            count = getattr(task, f"{split}_count")
            place = f"{task.name} {split}: no file matches {tmp_path / getattr(task, split)}; "
            (line,) = [line for line in shown.splitlines() if line.startswith(place)]
            assert line.endswith(f"expected there: {count:,} rows from {suite().source}")
            folder = tmp_path / task.image_folder(split)
            assert f"{task.name} {split}: no image folder {folder}; expected there: images of {task.source}\n" in shown


def test_repeated_rows_and_unreferenced_images_are_no_problems(data: Path) -> None:
    path = data / VQA / "annotations/output_002.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{first}\n")
    report = check(data)
    assert report.problems == 0
    assert report.tasks["VQAv2"].splits["train"].repeated == [f"{path}:2 = {path}:1"]
    assert str(data / IMAGES / json.loads(second)["image"]) in report.unreferenced_images
    assert report.unreferenced == len(report.unreferenced_images) == 1 + 3


def test_overlap_is_found_across_image_folders_and_phrasings(data: Path) -> None:
    """train2014/x.jpg below COCO2014 is x.jpg below COCO2014/train2014; the sentence that asks for brevity is no part
    of the question, and the later question of a conversation counts too."""
    path = data / VQA / "questions/test.json"
    rows = json.loads(path.read_text())
    rows[0] |= {
        "image": "train2014/000000000002.jpg",
        "text": "Where is  2? Answer each question using a single word or phrase.",
    }
    rows[1] |= {"image": "train2014/000000000004.jpg", "text": f"color? {SHORT}"}
    rows[2] |= {"image": "train2014/000000000001.jpg", "text": f"Another? {SHORT}"}
    listing(path, rows)
    found = check(data).tasks["VQAv2"]
    train = data / VQA / "annotations"
    assert found.shared_items == [f"{path}#0 = {train}/output_001.jsonl:3", f"{path}#1 = {train}/output_002.jsonl:1"]
    assert len(found.shared_images) == 3


def test_a_caption_in_train_and_test_is_an_overlap(data: Path) -> None:
    path = data / "SEED-Data-Flickr30k/questions/test.json"
    rows = json.loads(path.read_text())
    rows[1]["text"] = "Please generate the image: Two cats 4."
    listing(path, rows)
    report = check(data)
    assert len(report.tasks["Flickr30k"].shared_items) == report.problems == 1


def test_a_link_to_a_folder_above_is_not_followed(data: Path) -> None:
    (data / VQA / "COCO2014/loop").symlink_to(data / VQA, target_is_directory=True)
    assert check(data).unreferenced == 3


def test_text_is_shortened_and_json_is_complete(data: Path, tmp_path: Path) -> None:
    append(data / VQA / "annotations/output_001.jsonl", *["{"] * 30)
    report = check(data)
    shown = data_check_text.text(report)
    assert shown.count("is not JSON") == data_check_text.SHOWN
    assert "... and 20 more" in shown
    data_check_text.write_json(report, tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert len(values["tasks"]["VQAv2"]["splits"]["train"]["malformed"]) == 30
    assert values["problems"] == report.problems == 31


def test_exit_status(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(suites.FOLDER / "continual-next", tmp_path / "small")
    for task in suite().tasks:
        change(folder / f"{task.name}.json", train_count=6, test_count=3)
    verb = ["data", "check", str(data), "--suite", str(folder)]
    assert main([*verb, "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == 0
    shown = capsys.readouterr()
    assert "no problems" in shown.out
    assert "checking VQAv2 train images" in shown.err
    (data / IMAGES / "000000000000.jpg").unlink()
    assert main(verb) == 1
    assert "1 problem\n" in capsys.readouterr().out
    assert main(["data", "check", str(data / "none")]) == 2
    assert "expected a folder with the files of suite continual-next" in capsys.readouterr().err
    assert main([*verb, "--json", str(tmp_path / "none/report.json")]) == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A suite with one task of edits in chat messages, one row of which has no target, and its data."""
    picture(tmp_path / "images/a.png")
    talk = [{"role": "user", "content": "<image>Make it red."}, {"role": "assistant", "content": "Done. <image>"}]
    bare = [talk[0], {"role": "assistant", "content": "Done."}]
    good = {"messages": talk, "images": ["a.png", "a.png"]}
    listing(tmp_path / "train.json", [good, {"messages": bare, "images": ["a.png"]}])
    listing(tmp_path / "test.json", [good, {"messages": bare, "images": ["a.png"]}])
    task = {
        "reads": ["text", "image"], "writes": ["text", "image"], "format": "messages", "scorer": "clip_image",
        "train": "train.json", "test": "test.json", "train_images": "images", "test_images": "images",
    }  # fmt: skip
    listing(tmp_path / "Edits.json", task)
    listing(
        tmp_path / "suite.json", {"tasks": ["Edits"], "orders": {}, "budgets": {"default": {"steps": {"Edits": 1}}}}
    )
    return tmp_path


def test_a_test_row_without_the_target_that_its_scorer_needs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the check, by a run's start, and by its dry run; a training row needs none."""
    wanted = f"{folder}/test.json#1: names no target image, with which the scorer clip_image compares"
    main(["data", "check", str(folder), "--suite", str(folder)])
    assert wanted in capsys.readouterr().out
    run = ["--suite", str(folder), "--data", str(folder), "--method", "lora", "--device", "cpu", "--clip", "tiny"]
    for more in ([], ["--dry-run"]):
        assert run_main([*run, "--out", str(folder / "runs"), *more]) == 2
        error = capsys.readouterr().err
        assert wanted in error
        assert "train.json" not in error


def test_all_samples_that_are_too_long_are_named() -> None:
    """By a backbone that reads 20 characters: of training rows with their answers, of test rows the question alone."""

    class Short:
        def check_length(self, sample: Sample) -> None:
            if sum(len(turn.instruction + turn.answer) for turn in sample.turns) > 20:
                raise UserError(f"{sample.origin} is too long")

    rows = [Sample("x", (Turn("what?", "red" * length),), origin=f"#{length}") for length in (1, 5, 6, 9)]
    with pytest.raises(DataError) as error:
        check_lengths(Short(), {"train": {"a": rows[:2], "b": rows[2:]}, "test": {"a": rows}})
    assert str(error.value).splitlines() == ["2 samples cannot be used", "#6 is too long", "#9 is too long", SKIP]


@pytest.mark.parametrize(("backbone", "status"), [("emu3", 1), ("tiny", 0), (None, 1)])
def test_a_backbone_s_needs_are_asked(backbone: str | None, status: int, folder: Path, capsys: Any) -> None:
    picture(folder / "images/a.png", size=(300, 1))
    change(folder / "Edits.json", scorer="short_answer")
    listing(folder / "test.json", [{"messages": TALK, "image": "a.png"}])
    listing(folder / "train.json", [{"messages": [{**TALK[0], "content": "Where?"}, TALK[1]], "image": "a.png"}])
    options = ["--backbone", backbone] if backbone else []
    assert main(["data", "check", str(folder), "--suite", str(folder), *options]) == status
    reason = (
        "images/a.png (300 x 1 pixels, of which emu3 reads none with one side over 200 times the other), named first"
    )
    assert (reason in capsys.readouterr().out) == bool(status)


def test_rows_of_other_formats_are_checked_too(tmp_path: Path) -> None:
    """CoIN: LLaVA conversations in training, question and answer in the test, images below the data folder itself."""
    coin = suites.load("coin")
    task = coin.task("GQA")
    picture(tmp_path / "GQA/images/1.jpg")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Dog"}]
    listing(tmp_path / task.train, [{"id": 1, "image": "./GQA/images/1.jpg", "conversations": talk}])
    lines(tmp_path / "unread.jsonl", [])
    listing(tmp_path / task.test, [{"question_id": 1, "image": "GQA/images/1.jpg", "text": "What?", "answer": "Dog"}])
    report = data_check.check(dataclasses.replace(coin, tasks=(task,)), tmp_path, Watch())
    assert len(report.tasks["GQA"].shared_items) == report.problems == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_task_that_reads_images_and_has_none(split: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the check as by a run."""
    change(folder / "Edits.json", scorer="short_answer")
    row = {"messages": TALK, "image": "a.png"}
    listing(folder / "train.json", [row])
    listing(folder / "test.json", [{"messages": [{**TALK[0], "content": "Where?"}, TALK[1]], "image": "a.png"}])
    assert main(["data", "check", str(folder), "--suite", str(folder)]) == 0
    listing(folder / f"{split}.json", [{"messages": [{**TALK[0], "content": "When?"}, TALK[1]]}])
    assert main(["data", "check", str(folder), "--suite", str(folder)]) == 1
    assert "task Edits reads images, and none of its 1 rows in" in capsys.readouterr().out
