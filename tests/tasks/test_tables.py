"""Parquet, CSV and datasets as files of rows: read as the same rows in JSON are, errors with file and row."""

from __future__ import annotations

import base64
import datetime
import io
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from cnext import RunConfig, run
from cnext.cli import main
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.image_files import open_image
from cnext.tasks import formats, rows, subset, suites, tables
from cnext.tasks.base import DataError, Sample, Task

QUESTIONS = [
    {"question_id": 7, "text": "what?", "answer": "red", "note": 1.5},
    {"question_id": 8, "text": "where?", "answer": ["here", "there"], "note": None},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNEXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def picture(color: str, kind: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def task(train: str = "rows.parquet", reader: str = "conversation", test: str = "", **changes: Any) -> Task:
    return Task("T", ("text",), ("text",), reader, "exact_answer", train, test or train, **changes)


def read(data: Path, train: str = "rows.parquet", reader: str = "conversation", split: str = "train") -> list[Sample]:
    return formats.read_samples(task(train, reader), data, split)


def problems(data: Path, name: str, reader: str = "conversation") -> list[str]:
    return [f"{line.origin}: {line.problem}" for line in formats.scan(task(name, reader), data, "test") if line.problem]


@pytest.mark.parametrize(
    ("module", "reader", "suffix"), [(formats, "rows", "csv"), (tables, "lines", "csv"), (rows, "_lines", "jsonl")]
)
def test_files_are_closed_where_reading_ends_early(
    module: ModuleType, reader: str, suffix: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a traceback keeps the generators: left to the garbage collector, they leave a file open until then."""
    pandas.DataFrame(QUESTIONS).to_csv(data / "rows.csv", index=False)
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    kept: list[Any] = []
    read = getattr(module, reader)
    monkeypatch.setattr(module, reader, lambda *given: kept.append(read(*given)) or kept[-1])
    lines = formats.scan(task(f"rows.{suffix}"), data, "train")
    assert next(lines).sample is not None
    assert kept[0].gi_frame is not None
    lines.close()
    assert kept[0].gi_frame is None


def write_parquet(path: Path, listed: list[dict]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(listed), path)


def write_csv(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def test_a_parquet_file_is_read_as_the_same_rows_in_json(data: Path) -> None:
    conversations = [
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "1"}],
        },
        {"image": None, "conversations": [{"from": "human", "value": "where?"}, {"from": "gpt", "value": "2"}]},
    ]
    messages = [
        {
            "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}],
            "images": ["a.png"],
        },
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}], "images": []},
    ]
    chat = [{"data": ["what?", "red", "where?", "here"], "image": "a.png", "size": [4, 5], "loss": None}]
    boxes = [{"text": "where?", "answer_bbox": [0.1, 0.2, 0.3, 0.4], "size": [4, 5]}]
    (data / "a.png").write_bytes(picture("red"))
    for reader, listed in (("llava", conversations), ("messages", messages), ("conversation", chat), ("llava", boxes)):
        write_parquet(data / "rows.parquet", listed)
        (data / "rows.json").write_text(json.dumps(listed))
        found, expected = (read(data, f"rows.{kind}", reader) for kind in ("parquet", "json"))
        assert [sample.turns for sample in found] == [sample.turns for sample in expected]
        assert [sample.image for sample in found] == [sample.image for sample in expected]
        assert found[0].origin == f"{data / 'rows.parquet'}#0"


def test_absent_values_are_absent(data: Path) -> None:
    """Null and NaN, which pandas writes for it, are no text, no id and no image; whole numbers stay whole."""
    pandas.DataFrame(
        {
            "id": [1, 2, 3],
            "question": ["a?", "b?", "c?"],
            "answer": ["x", "nan", "NA"],
            "image": [None, None, numpy.nan],
        }
    ).to_parquet(data / "rows.parquet")
    samples = read(data)
    assert [(sample.id, sample.turns[0].answer, sample.image) for sample in samples] == [
        ("1", "x", None),
        ("2", "nan", None),
        ("3", "NA", None),
    ]
    pandas.DataFrame({"question": ["a?", "b?"], "answer": [1.5, numpy.nan]}).to_parquet(data / "rows.parquet")
    assert problems(data, "rows.parquet") == [f"{data / 'rows.parquet'}#1: lacks the key 'answer'; it has: question"]
    write_parquet(data / "rows.parquet", [{"question": "a?", "answer": 3}, {"question": "b?", "answer": 0}])
    assert [sample.turns[0].answer for sample in read(data)] == ["3", "0"]
    write_parquet(
        data / "rows.parquet", [{"question": "a?", "answers": ["1", "one"]}, {"question": "b?", "answers": [None]}]
    )
    assert problems(data, "rows.parquet")[0].endswith("a string, a number or a list of these, got NoneType")


def test_cells_of_csv_are_text(data: Path) -> None:
    write_csv(
        data / "rows.csv",
        "\ufeffid, question,answer,image\r\n"
        '01,"which, and\nwhere?",01,\r\n\r\n'
        '2,"say ""hi""",NA,none\r\n3,number?,1e5,\r\n4,truth?,nan,"null"\r\n',
    )
    found = [(s.id, s.turns[0].instruction, s.turns[0].answer, s.image, s.origin) for s in read(data, "rows.csv")]
    assert found == [
        ("01", "which, and\nwhere?", "01", None, f"{data / 'rows.csv'}:2"),
        ("2", 'say "hi"', "NA", None, f"{data / 'rows.csv'}:5"),
        ("3", "number?", "1e5", None, f"{data / 'rows.csv'}:6"),
        ("4", "truth?", "nan", None, f"{data / 'rows.csv'}:7"),
    ]
    write_csv(data / "rows.tsv", "question\tanswer\na, b?\tyes\n")
    assert read(data, "rows.tsv")[0].turns[0].instruction == "a, b?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\na,b,c\n", ":2: has 3 cells for 2 columns: question, answer"),
        (b"question,answer\na,b\n\nc\n", ":4: has 1 cells for 2 columns"),
        (b"question,answer\na,\n", ":2: lacks the key 'answer'; it has: question"),
        (b"question;answer\na;b\n", ":1: has columns separated by ';', expected ','; write it with sep=','"),
        (b"question\tanswer\na\tb\n", r":1: has columns separated by '\\t', expected ','"),
        (b",question,answer\n0,a,b\n", ":1: must begin with a line of distinct .*; write a DataFrame with index=False"),
        (
            b"question,question\na,b\n",
            r":1: must begin with a line of distinct names of columns, got \['question', 'qu",
        ),
        (b"question,\na,b\n", ":1: must begin with a line of distinct names"),
        (b'question,answer\n"a,b\n', ":2: is not CSV: unexpected end of data"),
        (b"question,answer\nfa\xe7ade,b\n", r":2: is not UTF-8 text \(invalid"),
        ("question,answer\na,b\n".encode("utf-16"), ":1: is not UTF-8 text"),
        (
            b"question,answer\n" + b"a" * 200_000 + b",b\n",
            r":2: is not CSV: field larger than field limit \(131072\); write it as Parquet",
        ),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(content: bytes, message: str, data: Path) -> None:
    (data / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"rows.csv{message}"):
        read(data, "rows.csv")


def test_images_as_bytes_are_opened_as_files_are(data: Path, cache: Path) -> None:
    """As the library ``datasets`` writes them, or a plain column of bytes; turned by their tags, once each."""
    exif = Image.Exif()
    exif[274] = 6
    turned = picture("red", "JPEG", exif=exif)
    write_parquet(
        data / "rows.parquet",
        [
            {"image": {"bytes": turned, "path": "a.jpg"}, "question": "a?", "answer": "b"},
            {"image": {"bytes": turned, "path": None}, "question": "c?", "answer": "d"},
            {"image": {"bytes": None, "path": "../no.png"}, "question": "e?", "answer": "f"},
            {"image": None, "question": "g?", "answer": "h"},
        ],
    )
    lines = list(formats.scan(task(), data, "train"))
    assert "leaves the image folder" in lines[2].problem
    first, second, _, none = (line.sample for line in lines)
    assert first.image == second.image
    assert none.image is None
    assert first.image.is_relative_to(cache / "images")
    assert open_image(first.image).size == (6, 8)
    write_parquet(data / "rows.parquet", [{"image": turned, "question": "a?", "answer": "b"}])
    assert read(data)[0].image == first.image
    first.image.write_bytes(b"cut")
    assert read(data)[0].image.read_bytes() == turned


def test_lists_and_parts_of_messages_hold_images(data: Path) -> None:
    red, blue = ({"bytes": picture(color), "path": f"{color}.png"} for color in ("red", "blue"))
    said = [{"role": "user", "content": "<image>draw"}, {"role": "assistant", "content": "<image>"}]
    write_parquet(data / "rows.parquet", [{"messages": said, "images": [red, blue]}])
    [sample] = read(data, reader="messages")
    assert [open_image(path).getpixel((0, 0)) for path in (sample.image, sample.target_image)] == [
        (255, 0, 0),
        (0, 0, 255),
    ]
    parts = [{"type": "text", "text": "what?", "image": None}, {"type": "image", "text": None, "image": red}]
    answer = [{"type": "text", "text": "red", "image": None}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    write_parquet(data / "rows.parquet", [{"messages": said}])
    [found] = read(data, reader="messages")
    assert (found.image, found.image_first, found.turns[0].instruction) == (sample.image, False, "what?")
    write_parquet(data / "rows.parquet", [{"messages": said, "images": [blue]}])
    assert "in parts of its messages, and others beside them" in problems(data, "rows.parquet", "messages")[0]
    edit = {"source_image": red, "target_image": blue, "instruction": "paint it"}
    write_parquet(data / "rows.parquet", [edit])
    [edited] = read(data, reader="editing")
    assert (edited.image, edited.target_image) == (sample.image, sample.target_image)


@pytest.mark.parametrize("column", ["image_2", "photo", "crop", "depth_map", "frame"])
def test_an_image_that_no_column_names_is_refused_and_others_are_told_apart(column: str, data: Path) -> None:
    red, blue = ({"bytes": picture(color), "path": None} for color in ("red", "blue"))
    write_parquet(data / "rows.parquet", [{column: blue, "question": "a?", "answer": "b"}])
    assert problems(data, "rows.parquet") == [
        f"{data / 'rows.parquet'}#0: has an image that is not read, in {column!r}; name its column 'image'"
    ]
    write_parquet(data / "rows.parquet", [{"image": red, column: blue, "question": "a?", "answer": "b"}])
    assert bool(problems(data, "rows.parquet")) == (column not in ("crop", "frame"))


def test_a_file_that_is_no_parquet_is_named(data: Path) -> None:
    write_parquet(data / "rows.parquet", QUESTIONS[:1] * 300)
    whole = (data / "rows.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[4:], b"PAR1" + bytes(len(whole) - 8) + whole[-4:]):
        (data / "rows.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.parquet#0: cannot be read as Parquet: "):
            read(data)


def test_a_saved_dataset_is_a_file_of_rows(data: Path) -> None:
    """A Dataset, and each split of a DatasetDict; images with their bytes, also of one that was filtered."""
    image = Image.new("RGB", (8, 6), "red")
    whole = datasets.Dataset.from_dict(
        {"image": [image, None, image], "question": ["a?", "b?", "c?"], "answer": ["1", "2", "3"]}
    )
    split = datasets.DatasetDict(
        {"train": whole.select([0, 2]), "test": whole.filter(lambda row: row["answer"] == "2")}
    )
    whole.save_to_disk(str(data / "whole"))
    split.save_to_disk(str(data / "split"))
    assert [sample.turns[0].answer for sample in read(data, "whole")] == ["1", "2", "3"]
    assert [bool(sample.image) for sample in read(data, "whole")] == [True, False, True]
    assert [sample.turns[0].answer for sample in read(data, "split/train")] == ["1", "3"]
    assert [sample.turns[0].answer for sample in read(data, "split/test")] == ["2"]
    assert read(data, "whole")[0].origin == f"{data / 'whole'}#0"
    with pytest.raises(DataError, match="split holds several splits; name one of them in the manifest: test, train"):
        read(data, "split")
    next((data / "whole").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(DataError, match="whole#0: cannot be read as a saved dataset: "):
        read(data, "whole")


@pytest.mark.parametrize(("name", "package"), [("rows.parquet", "pyarrow"), ("whole", "datasets")])
def test_a_package_that_is_missing_is_named(
    name: str, package: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(data / "rows.parquet", QUESTIONS[:1])
    datasets.Dataset.from_list(QUESTIONS[:1]).save_to_disk(str(data / "whole"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{name} needs the package {package} .*pip install 'cnext\[data\]'"):
        read(data, name)


@pytest.fixture
def birds(tmp_path: Path, data: Path) -> Path:
    """A suite folder whose data are two Parquet files, and the files."""
    folder = tmp_path / "birds"
    folder.mkdir()
    budget = {"steps": {"Photos": 2}, "batch_size": 2, "warmup_steps": 1}
    (folder / "suite.json").write_text(json.dumps({"tasks": ["Photos"], "orders": {}, "budgets": {"default": budget}}))
    manifest = {"reads": ["text", "image"], "writes": ["text"], "format": "conversation", "scorer": "exact_answer"}
    (folder / "Photos.json").write_text(json.dumps(manifest | {"train": "train.parquet", "test": "test.parquet"}))
    colors = ["red", "blue", "green", "black"]
    for name, chosen in (("train", colors), ("test", ["white", "gray"])):
        write_parquet(
            data / f"{name}.parquet",
            [{"image": {"bytes": picture(c), "path": None}, "question": "which color?", "answer": c} for c in chosen],
        )
    return folder


def test_the_data_check_looks_into_the_images(birds: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(data), "--suite", str(birds)]) == 0
    shown = parquet.read_table(data / "train.parquet").to_pylist()[0]["image"]
    listed = [
        {"image": {"bytes": b"no picture", "path": None}, "question": "which?", "answer": "a"},
        {"image": shown, "question": "which color?", "answer": "red"},
        {"image": {"bytes": None, "path": "gone.png"}, "question": "which?", "answer": "b"},
        {"image": shown, "question": "which?", "answer": None},
        {"image": None, "question": "which?", "answer": " "},
    ]
    write_parquet(data / "test.parquet", listed)
    assert main(["data", "check", str(data), "--suite", str(birds), "--json", str(data / "report.json")]) == 1
    capsys.readouterr()
    report = json.loads((data / "report.json").read_text())["tasks"]["Photos"]
    test = report["splits"]["test"]
    assert (test["rows"], test["images"], test["without_image"]) == (5, 3, 1)
    place = f"{data / 'test.parquet'}#"
    assert test["malformed"][0].startswith(f"{place}3: lacks the key 'answer'")
    assert test["broken_images"][0].endswith(f"named first by {place}0")
    assert test["missing_images"] == [f"{data / 'gone.png'}, named first by {place}2"]
    assert test["references"][0].startswith(f"{place}4: expected a reference")
    assert report["shared_items"] == [f"{place}1 = {data / 'train.parquet'}#0"]
    assert report["shared_images"] == [f"{place}1 = {data / 'train.parquet'}#0"]


def test_a_subset_has_the_images_as_files(birds: Path, data: Path, tmp_path: Path) -> None:
    subset.write_subset(suites.load(str(birds)), data, 2, 0, tmp_path / "small")
    photos = suites.load(str(tmp_path / "small")).task("Photos")
    for split in ("train", "test"):
        samples = formats.read_samples(photos, tmp_path / "small", split)
        assert len(samples) == 2
        assert all(sample.image.is_relative_to(tmp_path / "small") for sample in samples)


def test_a_run_reads_parquet(birds: Path, data: Path, tmp_path: Path) -> None:
    results = run(RunConfig(method="lora", suite=str(birds), data=data, out=tmp_path / "runs", device="cpu"))
    assert results["samples"] == {"Photos": 2}


def given(data: Path) -> dict[str, dict[str, Any]]:
    return {
        "Photos": {
            split: datasets.Dataset.from_parquet(str(data / f"{split}.parquet"), cache_dir=str(data / "hf"))
            for split in ("train", "test")
        }
    }


def test_datasets_in_memory_are_a_runs_data(birds: Path, data: Path, tmp_path: Path) -> None:
    """Named by their rows: the same rows resume a run, and others are refused."""
    shown = given(data)
    made = lambda values: RunConfig(method="lora", suite=str(birds), data=values, out=tmp_path / "runs", device="cpu")  # noqa: E731
    folder = plan(made(shown)).config.data
    assert plan(made(given(data))).config.data == folder
    assert run(made(shown))["samples"] == {"Photos": 2}
    assert run(made(folder))["samples"] == {"Photos": 2}
    other = {"Photos": {"train": shown["Photos"]["train"].select([0, 1]), "test": shown["Photos"]["test"]}}
    with pytest.raises(UserError, match=r"another configuration:\n  data: "):
        run(made(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shown: {"Photo": shown["Photos"]}, "unknown task 'Photo'; valid: Photos"),
        (lambda shown: {"Photos": shown["Photos"]["train"]}, "expected the splits of task Photos, .* got Dataset"),
        (lambda shown: {"Photos": {"validation": 1}}, "unknown split of task Photos 'validation'; valid: train, test"),
        (
            lambda shown: {"Photos": {"train": [{}]}},
            r"expected a datasets\.Dataset as split train of task Photos, got list",
        ),
        (lambda shown: {}, "no Dataset for split train of task Photos"),
        (lambda shown: {"Photos": {"train": shown["Photos"]["train"]}}, "no Dataset for split test of task Photos"),
        (
            lambda shown: {"Photos": {**shown["Photos"], "test": shown["Photos"]["test"].select([])}},
            "expected a Dataset with rows as split test of task Photos",
        ),
        (
            lambda shown: {"Photos": {**shown["Photos"], "test": shown["Photos"]["test"].with_transform(dict)}},
            "the Dataset for split test of task Photos has a transform",
        ),
    ],
)
def test_other_objects_are_refused(change: Callable, message: str, birds: Path, data: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=message):
        plan(RunConfig(suite=str(birds), data=change(given(data)), device="cpu"))
    assert not list(cache.glob(".datasets-*"))


def test_a_pattern_cannot_hold_a_dataset(birds: Path, data: Path) -> None:
    manifest = json.loads((birds / "Photos.json").read_text())
    (birds / "Photos.json").write_text(json.dumps(manifest | {"train": "train*.parquet"}))
    with pytest.raises(UserError, match=r"is the pattern 'train\*\.parquet'; .* such as Photos/train"):
        plan(RunConfig(suite=str(birds), data=given(data), device="cpu"))


def test_two_splits_at_one_path_are_refused(birds: Path, data: Path) -> None:
    manifest = json.loads((birds / "Photos.json").read_text())
    (birds / "Photos.json").write_text(json.dumps(manifest | {"test": "./train.parquet"}))
    message = r"split test of task Photos and split train of task Photos are both 'train\.parquet'"
    with pytest.raises(UserError, match=message):
        plan(RunConfig(suite=str(birds), data=given(data), device="cpu"))


def test_the_folder_of_datasets_depends_on_the_paths_of_the_manifest(birds: Path, data: Path) -> None:
    """With train and test exchanged in the manifest, each split still reads its own rows."""
    shown = given(data)
    manifest = json.loads((birds / "Photos.json").read_text())
    for train, test in (("train.parquet", "test.parquet"), ("test.parquet", "train.parquet")):
        (birds / "Photos.json").write_text(json.dumps(manifest | {"train": train, "test": test}))
        planned = plan(RunConfig(suite=str(birds), data=shown, device="cpu"))
        photos = planned.suite.task("Photos")
        assert [len(formats.read_samples(photos, planned.config.data, split)) for split in ("train", "test")] == [4, 2]


def test_a_saved_dataset_without_rows_is_named(data: Path) -> None:
    datasets.Dataset.from_dict({"question": [], "answer": []}).save_to_disk(str(data / "none"))
    with pytest.raises(DataError, match="none#0: cannot be read as a saved dataset: it has no rows"):
        read(data, "none")


def test_the_names_of_classes_are_answers(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a saved dataset, and in Parquet that datasets writes; -1 is no class."""
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = {"question": datasets.Value("string"), "answer": label, "several": [label], "inner": {"answer": label}}
    listed = [
        {"question": "a?", "answer": 1, "several": [0, 1], "inner": {"answer": 0}},
        {"question": "b?", "answer": 0, "several": [], "inner": {"answer": 1}},
        {"question": "c?", "answer": -1, "several": None, "inner": None},
    ]
    dataset = datasets.Dataset.from_list(listed, features=datasets.Features(features))
    dataset.save_to_disk(str(data / "saved"))
    dataset.to_parquet(str(data / "rows.parquet"))
    for name in ("saved", "rows.parquet"):
        first, second, third = formats.scan(task(name), data, "train")
        assert (first.row["answer"], first.row["several"], first.row["inner"]) == (
            "dog",
            ["cat", "dog"],
            {"answer": "cat"},
        )
        assert second.sample.turns[0].answer == "cat"
        assert third.problem.startswith("lacks the key 'answer'")


def test_bytes_that_are_empty_are_a_broken_image(data: Path) -> None:
    (data / "a.png").write_bytes(picture("red"))
    shown = [{"bytes": b"", "path": None}, {"bytes": b"", "path": ""}, {"bytes": b"", "path": "a.png"}, None]
    write_parquet(data / "rows.parquet", [{"image": image, "question": "a?", "answer": "b"} for image in shown])
    with pytest.raises(DataError, match="2 unusable rows") as raised:
        read(data)
    assert [f"#{row}: names an image that is broken" in str(raised.value) for row in range(4)] == [
        True,
        True,
        False,
        False,
    ]


def test_columns_of_one_name_are_refused(data: Path) -> None:
    columns = [pyarrow.array(["a?"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    table = pyarrow.Table.from_arrays(columns, names=["question", "answer", "answer"])
    parquet.write_table(table, data / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet#0: .* several columns of one name: answer; rename"):
        read(data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "answer": "x", "answers": ["y"]}, "has 'answer' and 'answers', which differ; keep one"),
        ({"question": "a?", "answer": "x", "answers": ["x", "y"]}, "has 'answer' and 'answers', which differ"),
        ({"question": "a?", "text": "b?", "answer": "x"}, "has 'text' and 'question', which differ; keep one"),
        ({"question": "a?", "answer": "x", "id no": "1", "id_no": "2"}, "has the keys id no with a space and with an"),
        ({"question": "a?", "answer": "x", "answers": ["x"], "text": "a?"}, ""),
        ({"question": "a?", "answer": "x", "answers": None, "text": None}, ""),
    ],
)
def test_keys_of_one_meaning_that_differ_are_refused(row: dict, message: str, data: Path) -> None:
    for name in ("rows.parquet", "rows.jsonl"):
        write_parquet(data / name, [row])
        if name == "rows.jsonl":
            (data / name).write_text(json.dumps({key: value for key, value in row.items() if value is not None}))
        found = problems(data, name)
        assert len(found) == bool(message)
        assert all(message in problem for problem in found)


def test_a_subset_has_dates_and_decimals_as_text(birds: Path, data: Path, tmp_path: Path) -> None:
    """Beside images as paths, which are not unpacked."""
    (data / "a.png").write_bytes(picture("red"))
    made = {"day": datetime.date(2024, 5, 6), "time": datetime.datetime(2024, 5, 6, 7, 8), "price": Decimal("1.50")}
    for split in ("train", "test"):
        write_parquet(data / f"{split}.parquet", [{"image": "a.png", "question": split, "answer": "b", **made}])
    assert main(["data", "subset", str(data), "--suite", str(birds), "--n", "1", "--out", str(tmp_path / "small")]) == 0
    [row] = json.loads((tmp_path / "small/Photos/questions/test.json").read_text())
    assert (row["day"], row["time"], row["price"]) == ("2024-05-06", "2024-05-06 07:08:00", "1.50")


def test_numbers_are_written_as_they_were_meant(data: Path) -> None:
    """Floats of 32 bits with the digits that they have; integers of a column with gaps, which pandas makes floats."""
    columns = {
        "question": ["a?", "b?", "c?"],
        "answer": numpy.array([0.1, 2.5, 1e10], "float32"),
        "gaps": [3, None, 400],
        "parts": [1.0, None, 2.5],
        "full": [1.0, 2.0, 3.0],
    }
    frame = pandas.DataFrame(columns)
    frame.to_parquet(data / "frame.parquet")
    datasets.Dataset.from_pandas(frame).save_to_disk(str(data / "frame"))
    for name in ("frame.parquet", "frame"):
        lines = list(formats.scan(task(name), data, "train"))
        assert [line.sample.turns[0].answer for line in lines] == ["0.1", "2.5", "10000000000.0"]
        found = [[repr(line.row.get(key)) for line in lines] for key in ("gaps", "parts", "full")]
        assert found == [["3", "None", "400"], ["1.0", "None", "2.5"], ["1.0", "2.0", "3.0"]]
    box = {"box": [[0.1, 0.2, 0.3, 0.4]], "nested": [{"x": 0.7}], "half": numpy.array([0.1], "float16")}
    single = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema(
        [("box", single), ("nested", pyarrow.struct([("x", pyarrow.float32())])), ("half", pyarrow.float16())]
    )
    parquet.write_table(pyarrow.table(box, schema), data / "box.parquet")
    [(_, row)] = rows.rows(data / "box.parquet")
    assert row == {"box": [0.1, 0.2, 0.3, 0.4], "nested": {"x": 0.7}, "half": 0.1}
    parquet.write_table(pyarrow.table({"n": [float("nan"), 2.0], "none": [None, float("nan")]}), data / "nan.parquet")
    assert [row for _, row in rows.rows(data / "nan.parquet")] == [{}, {"n": 2}]


def test_suffixes_are_read_in_any_case_and_others_are_named(data: Path) -> None:
    write_parquet(data / "a.PARQUET", QUESTIONS[:1])
    write_csv(data / "b.CSV", "text,answer\nwhat?,red\n")
    (data / "c.JSON").write_text(json.dumps(QUESTIONS[:1]))
    (data / "d.JSONL").write_text(json.dumps(QUESTIONS[0]))
    for name in ("a.PARQUET", "b.CSV", "c.JSON", "d.JSONL"):
        assert read(data, name)[0].turns[0].answer == "red"
    for name in ("a.pq", "a.csv.gz", "a.json.gz", "a.xlsx", "a.arrow"):
        (data / name).write_bytes((data / "a.PARQUET").read_bytes())
        [problem] = problems(data, name)
        assert problem.endswith("by its suffix a file is .jsonl, .parquet, .csv or .tsv, any other is JSON")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_encoded_as_text_is_refused_in_one_short_line(kind: str, data: Path) -> None:
    image = Image.frombytes("RGB", (64, 64), numpy.random.default_rng(0).bytes(64 * 64 * 3))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    write_parquet(data / "rows.parquet", [{"image": encoded, "question": "a?", "answer": "b"}])
    [problem] = problems(data, "rows.parquet")
    assert f"'image' names no file: {encoded[:80]};" in problem
    assert len(problem) < 300 + len(str(data))
