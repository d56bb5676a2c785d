"""Rows that cannot be used: refused and named, or with ``skip`` left out, counted by reason and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tasks.official import lines, listing, write_continual_next

from cnext.errors import UserError
from cnext.tasks import data_check_text, formats, suites
from cnext.tasks.base import DataError, Sample, Turn
from cnext.tasks.left_out import LISTED, LeftOut
from cnext.training.setup import check_lengths

VQA, BOXES = "SEED-Data-VQAv2", "SEED-Data-Grounding"
SUITE = suites.load("continual-next")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four training rows of VQAv2 that cannot be used, and one test row of RefCOCO."""
    data = write_continual_next(tmp_path / "data")
    path = data / VQA / "annotations/output_002.jsonl"
    good = path.read_text()
    added = ({"image": "000000000000.jpg"}, {"image": "000000000000.jpg", "data": ["q", "a", "q"]})
    path.write_text(
        good + "".join(json.dumps(row) + "\n" for row in (*added, {"image": "gone.jpg", "data": ["q", "a"]}))
    )
    (data / VQA / "COCO2014/train2014/000000000001.jpg").write_bytes(b"no picture")
    path = data / BOXES / "questions/test.json"
    rows = json.loads(path.read_text())
    rows[1]["answer bbox"] = "everywhere"
    listing(path, rows)
    return data


def test_they_are_refused_and_all_are_named(data: Path) -> None:
    with pytest.raises(DataError, match="task VQAv2: 4 unusable rows") as error:
        formats.read_samples(SUITE.task("VQAv2"), data, "train")
    assert len(str(error.value).splitlines()) == 5


def test_they_are_skipped_and_counted_by_reason(data: Path) -> None:
    left = LeftOut()
    path = data / VQA / "annotations"
    kept = formats.read_samples(SUITE.task("VQAv2"), data, "train", skip=True, left=left)
    assert [Path(sample.origin).name for sample in kept] == [
        "output_001.jsonl:1", "output_001.jsonl:3", "output_001.jsonl:4", "output_002.jsonl:1", "output_002.jsonl:2",
    ]  # fmt: skip
    assert [sample.id for sample in kept][-1] == "VQAv2-train-000005", (
        "ids follow from the files, not from what is left"
    )
    assert len(formats.read_samples(SUITE.task("RefCOCO"), data, "test", skip=True, left=left)) == 2
    found = left.as_dict()
    assert {reason: rows["count"] for reason, rows in found["VQAv2"]["train"].items()} == {
        "broken image": 1, "malformed": 2, "missing image": 1,
    }  # fmt: skip
    assert [row.split(": ")[0] for row in found["VQAv2"]["train"]["malformed"]["rows"]] == [
        f"{path}/output_002.jsonl:{number}" for number in (3, 4)
    ]
    assert left.lines() == [
        "VQAv2 train: 4 rows left out: 1 broken image, 2 malformed, 1 missing image",
        "RefCOCO test: 1 row left out: 1 unusable reference",
    ]


def test_a_limit_counts_the_rows_that_are_kept(data: Path) -> None:
    left = LeftOut()
    kept = formats.read_samples(SUITE.task("VQAv2"), data, "train", 2, skip=True, left=left)
    assert [Path(sample.origin).name for sample in kept] == ["output_001.jsonl:1", "output_001.jsonl:3"]
    assert left.lines() == ["VQAv2 train: 1 row left out: 1 broken image"]


def test_a_split_is_not_skipped_as_a_whole(data: Path) -> None:
    for name in ("output_001.jsonl", "output_002.jsonl"):
        lines(data / VQA / "annotations" / name, [{"image": "gone.jpg", "data": ["q", "a"]}, {}])
    expected = r"no train samples in .*; 4 rows left out: 2 missing image, 2 malformed\n.*output_001.jsonl:1: names an"
    with pytest.raises(DataError, match=expected):
        formats.read_samples(SUITE.task("VQAv2"), data, "train", skip=True)


def test_all_are_counted_and_the_first_listed() -> None:
    left = LeftOut()
    for number in range(LISTED + 5):
        left.add("A", "test", "malformed", f"#{number}")
    found = left.as_dict()["A"]["test"]["malformed"]
    assert (found["count"], len(found["rows"])) == (LISTED + 5, LISTED)
    assert left.lines() == ["A test: 1,005 rows left out: 1,005 malformed"]


def test_samples_that_are_too_long_are_skipped() -> None:
    class Short:
        def check_length(self, sample: Sample) -> None:
            if len(sample.turns[0].instruction) > 5:
                raise UserError(f"{sample.origin} is too long")

    short, long = (Sample("x", (Turn(text),), origin=text) for text in ("what?", "what else?"))
    left = LeftOut()
    kept = check_lengths(Short(), {"train": {"a": [long, short]}, "test": {"a": [short]}}, skip=True, left=left)
    assert kept == {"train": {"a": [short]}, "test": {"a": [short]}}
    assert left.rows == {"a": {"train": {"too long": ["what else? is too long"]}}}


def test_the_check_shows_what_would_be_skipped(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as a run leaves out, though an image counts once in the table."""
    path = data / VQA / "annotations/output_001.jsonl"
    path.write_text(path.read_text() + '{"image": "gone.jpg", "data": ["another", "a"]}\n')
    data_check_text.main("continual-next", data, "verify", None)
    shown = capsys.readouterr().out
    reasons = "1 broken image, 2 missing image, 2 malformed"
    assert f"VQAv2 train: with --on-bad-row skip, 5 rows left out: {reasons} (of 10)\n" in shown
    assert "RefCOCO test: with --on-bad-row skip, 1 row left out: 1 unusable reference (of 3)\n" in shown
    assert shown.count("--on-bad-row") == 2
