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

from cnext.cli import main
from cnext.tasks import data_check, data_check_text, suites
from cnext.tasks.base import Suite

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


def check(data: Path, look: str = "verify") -> data_check.Report:
    return data_check.check(suite(), data, Watch(), look)


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
    picture(data / "SEED-Data-HQEdit/images/target_images/000000000001.jpg", size=(480, 399))
    report = check(data)
    (line,) = report.tasks["HQEdit"].splits["train"].left_out
    assert "output_001.jsonl:2: " in line
    assert "000000000001.jpg is 480x399" in line
    assert report.problems == 0
    assert "HQEdit train: rows left out of training by their images' sizes, as released" in data_check_text.text(report)
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


def test_missing_files_and_folders_are_named_once(data: Path) -> None:
    (data / VQA / "questions/test.json").unlink()
    os.rename(data / VQA / "COCO2014", data / VQA / "elsewhere")
    train, test = check(data).tasks["VQAv2"].splits.values()
    assert train.lacking == [f"no image folder {data / IMAGES}; expected there: 6 images of {suite().tasks[0].source}"]
    assert (train.problems, train.missing_images) == (1, [])
    assert test.lacking == [f"no file matches {data / VQA}/questions/test.json; {data / VQA}/questions holds nothing"]
    assert (test.problems, test.miscounted) == (1, False)


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
