"""References of test rows: what a scorer cannot use is named before a run, and several answers are found."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tasks.official import listing, picture

from cnext.cli import main
from cnext.scoring import SHORT_ANSWERS, make_scorers
from cnext.scoring.base import Prediction, reference_check
from cnext.tasks import data_check, formats, subset, suites
from cnext.tasks.base import DataError, Sample, Suite, Task, Turn
from cnext.tasks.rows import answers

GROUNDING = Task(
    "Grounding", ("text", "image"), ("text",), "conversation", "box", "train.json", "test.json", ".", ".", "held.json"
)
GOOD = ("[0.1,0.2,0.5,0.6]", "[1e-05,0.62,0.98,0.95]", "(0.65,0.62),(0.98,0.95)")
WITHOUT_AREA = ("[31,29,15,15]", "[0.2,0.7,0.8,0.7]")
NO_BOX = ("31 29 15 15", "left", "[0,0,1,1] or [0,0,1,1]")


class Silent:
    def begin(self, doing: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


def boxes(root: Path, *references: str, split: str = "test") -> None:
    picture(root / "a.png")
    rows = [
        {"question_id": i, "image": "a.png", "text": "Where?", "answer_bbox": box} for i, box in enumerate(references)
    ]
    listing(root / f"{split}.json", rows)


def report(root: Path, *tasks: Task) -> data_check.Report:
    return data_check.check(Suite("any", "", tasks, {}, {}), root, Silent())


def test_every_reference_that_is_no_box_is_named_when_it_is_read(tmp_path: Path) -> None:
    boxes(tmp_path, *GOOD, *NO_BOX, *WITHOUT_AREA)
    with pytest.raises(DataError) as error:
        formats.read_samples(GROUNDING, tmp_path, "test")
    first, *lines = str(error.value).splitlines()
    assert first == "task Grounding: 3 unusable rows"
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/test.json#{index}" for index in (3, 4, 5)]
    assert all("expected a reference box [x1,y1,x2,y2]" in line for line in lines)


def test_a_reference_without_area_is_read_and_warned_of(tmp_path: Path) -> None:
    boxes(tmp_path, *GOOD, *WITHOUT_AREA)
    samples = formats.read_samples(GROUNDING, tmp_path, "test")
    warning = formats.usable_flaws(GROUNDING, samples)
    assert warning.startswith("warning: Grounding: 2 of 5 references: ")
    assert f"{tmp_path}/test.json#3: " in warning
    assert "'[31,29,15,15]'" in warning
    assert formats.usable_flaws(GROUNDING, samples[:3]) == ""


def test_references_that_are_not_scored_may_be_anything(tmp_path: Path) -> None:
    boxes(tmp_path, *NO_BOX, split="train")
    assert len(formats.read_samples(GROUNDING, tmp_path, "train")) == 3
    boxes(tmp_path, *NO_BOX)
    other = dataclasses.replace(GROUNDING, scorer="short_answer")
    assert len(formats.read_samples(other, tmp_path, "test")) == 3
    boxes(tmp_path, *NO_BOX, split="held")
    with pytest.raises(DataError, match=r"held\.json#0"):
        formats.read_samples(GROUNDING, tmp_path, "validation")


def test_the_check_counts_both_kinds(tmp_path: Path) -> None:
    boxes(tmp_path, *GOOD, split="train")
    boxes(tmp_path, *GOOD, split="held")
    boxes(tmp_path, *GOOD, *NO_BOX, *WITHOUT_AREA)
    found = report(tmp_path, GROUNDING)
    split = found.tasks["Grounding"].splits["test"]
    places = [f"{tmp_path}/test.json#{index}" for index in (3, 4, 5, 6, 7)]
    assert [line.split(": ")[0] for line in split.references] == places
    assert (split.problems, split.malformed) == (5, [])
    assert found.tasks["Grounding"].splits["validation"].references == []


@pytest.mark.parametrize("reference", [*NO_BOX, *WITHOUT_AREA])
def test_data_check_ends_with_status_1(
    reference: str, toy_suite: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    path = folder / "RefCOCO/questions/test.json"
    rows = json.loads(path.read_text())
    rows[-1]["answer_bbox"] = reference
    listing(path, rows)
    assert main(["data", "check", str(folder), "--suite", str(toy_suite), "--images", "none"]) == 1
    shown = capsys.readouterr().out
    assert "RefCOCO test: references that cannot be scored: 1\n" in shown
    assert f"{path}#{len(rows) - 1}: " in shown
    assert repr(reference) in shown
    assert shown.endswith("1 problem\n")


@pytest.mark.parametrize("scorer", [*SHORT_ANSWERS, "cider"])
@pytest.mark.parametrize(
    "reference", ["", ".", " ", "\n", "\u3000", "\u3002", "\u200b", ["", ""], ["yes", ""]], ids=ascii
)
def test_a_reference_without_content_is_refused(scorer: str, reference: str | list[str], tmp_path: Path) -> None:
    """Before a run: an empty answer is equal to it, and every answer contains it."""
    task = dataclasses.replace(GROUNDING, scorer=scorer)
    picture(tmp_path / "a.png")
    rows = [{"question_id": 1, "image": "a.png", "text": "What?", "answer": each} for each in (reference, reference)]
    listing(tmp_path / "test.json", rows)
    with pytest.raises(DataError, match="2 unusable rows"):
        formats.read_samples(task, tmp_path, "test")
    assert len(report(tmp_path, task).tasks["Grounding"].splits["test"].references) == 2


@pytest.mark.parametrize("scorer", sorted({*SHORT_ANSWERS} - {"coin_textvqa"}))
@pytest.mark.parametrize("said", ["", ".", " \n", "\u3002"], ids=ascii)
def test_an_empty_answer_is_never_right_in_strict(scorer: str, said: str) -> None:
    (score,) = make_scorers()[scorer](None, [Sample("1", (Turn("What?", ""),))], [Prediction(said)])
    assert (score.strict, score.error) == (0, "instruction_unfollowing")


@pytest.mark.parametrize("reference", ["0", "?", "a", "the", "-", "\u65e5", "$", "..."])
def test_a_reference_of_one_character_has_content(reference: str) -> None:
    task = dataclasses.replace(GROUNDING, scorer="short_answer")
    assert reference_check(task)(Sample("1", (Turn("What?", reference),))) is None


@pytest.mark.parametrize(
    ("key", "given", "accepted"),
    [
        ("answer_bbox", [0.1, 0.2, 0.3, 0.4], ("[0.1,0.2,0.3,0.4]",)),
        ("answer_bbox", [0, 1e-05, 1, 0.95], ("[0,1e-05,1,0.95]",)),
        ("answer_bbox", "[0.1,0.2,0.3,0.4]", ("[0.1,0.2,0.3,0.4]",)),
        ("answer_bbox", ["[0,0,1,1]"], ("[0,0,1,1]",)),
        ("answer", 3, ("3",)),
        ("answer", 0, ("0",)),
        ("answer", -1.5, ("-1.5",)),
        ("answer", [3, 4], ("3", "4")),
        ("answer", [3, "three"], ("3", "three")),
        ("answer", ["red", "crimson"], ("red", "crimson")),
        ("answer", "red", ("red",)),
    ],
)
def test_answers_may_be_numbers(key: str, given: Any, accepted: tuple[str, ...], tmp_path: Path) -> None:
    task = dataclasses.replace(GROUNDING, scorer="box" if key == "answer_bbox" else "short_answer")
    picture(tmp_path / "a.png")
    row = {"question_id": 1, "image": "a.png", "text": "Where?", key: given}
    listing(tmp_path / "test.json", [row])
    assert formats.read_samples(task, tmp_path, "test")[0].answers == accepted


@pytest.mark.parametrize("key", ["answer", "answer_bbox"])
@pytest.mark.parametrize(
    "given",
    [
        [],
        [[]],
        [[0, 0, 1, 1]],
        True,
        [True],
        None,
        [None],
        {},
        {"a": 1},
        math.nan,
        [math.inf] * 4,
        [10**400, "x", None],
    ],
    ids=range(12),
)
def test_other_answers_are_refused(key: str, given: Any) -> None:
    with pytest.raises(ValueError, match=rf"^'{key}' must be a "):
        answers({key: given}, key)


@pytest.mark.parametrize(
    "given", [3, [0.1, 0.2, 0.3], [0, 0, 1, 1, 0.9], [0, 0, 1, "1"], [0, 0, 1, math.nan], [1, None]]
)
def test_numbers_that_are_no_box_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="'answer_bbox' must be a box of four numbers, got "):
        answers({"answer_bbox": given}, "answer_bbox")


TEXTVQA = suites.load("coin").task("TextVQA")
TEN = [*["stop"] * 2, *["stop sign"] * 8]


def textvqa(root: Path, *rows: dict[str, Any], data: Any = None) -> None:
    """Test rows of CoIN's TextVQA, and the file of TextVQA's authors."""
    picture(root / "TextVQA/a.jpg")
    common = {"image": "TextVQA/a.jpg", "text": "What does it say?"}
    listing(root / TEXTVQA.test, [common | row for row in rows])
    if data is not None:
        (root / TEXTVQA.references).write_text(json.dumps(data))


def test_ten_answers_from_the_file_of_textvqa(tmp_path: Path) -> None:
    """By the question's id, whether it is a number or a string, and whatever the order."""
    listed = [{"question_id": k, "answers": [f"{k}"] * 10} for k in (34603, 34602, 7)]
    rows = ({"question_id": 34602, "answer": "one"}, {"question_id": "34603"})
    textvqa(tmp_path, *rows, data={"dataset_type": "val", "data": listed})
    samples = formats.read_samples(TEXTVQA, tmp_path, "test")
    assert [sample.answers for sample in samples] == [("34602",) * 10, ("34603",) * 10]


@pytest.mark.parametrize(("empty", "refused"), [(1, False), (9, False), (10, True)])
def test_of_ten_people_some_may_have_written_nothing(empty: int, refused: bool) -> None:
    given = ("",) * empty + ("stop",) * (10 - empty)
    sample = Sample("1", (Turn("What?", given[0]),), references=given)
    assert (reference_check(TEXTVQA)(sample) is not None) == refused
    if not refused:
        (score,) = make_scorers()["coin_textvqa"](TEXTVQA, [sample], [Prediction("")])
        assert score.strict == 0


def test_ten_answers_of_a_row_need_no_file(tmp_path: Path) -> None:
    textvqa(tmp_path, {"question_id": 1, "answer": TEN})
    assert formats.read_samples(TEXTVQA, tmp_path, "test")[0].answers == tuple(TEN)


def test_a_missing_file_of_answers_is_named(tmp_path: Path) -> None:
    textvqa(tmp_path, {"question_id": 1, "answer": "stop"})
    with pytest.raises(DataError, match=r"cannot read the captions or answers .*TextVQA_0\.5\.1_val\.json"):
        formats.read_samples(TEXTVQA, tmp_path, "test")
    (line,) = report(tmp_path, TEXTVQA).tasks["TextVQA"].splits["test"].lacking
    assert "TextVQA_0.5.1_val.json" in line


@pytest.mark.parametrize(
    ("row", "data", "reason"),
    [
        ({"question_id": 2}, {"data": [{"question_id": 1, "answers": TEN}]}, "'question_id' must be one of those in"),
        ({"question_id": 1}, {"data": [{"question_id": 1, "answers": TEN[:9]}]}, "the answers of 10 people, .* got 9"),
        ({"question_id": 1}, {"data": [{"question_id": 1, "answers": "stop"}]}, "the answers of 10 people, .* got 1"),
        ({"question_id": 1}, {"data": [{"question_id": 1}]}, "cannot read the captions or answers .*'answers'"),
        ({"question_id": 1}, {"data": [3]}, "cannot read the captions or answers"),
        ({"question_id": 1}, {"data": 3}, "cannot read the captions or answers"),
        ({"question_id": 1}, [], "cannot read the captions or answers"),
        ({"question_id": 1}, 3, "cannot read the captions or answers"),
        ({"question_id": 1, "answer": ["stop"] * 3}, None, "the answers of 10 people, .* got 3"),
    ],
)
def test_bad_answers_are_refused(tmp_path: Path, row: dict[str, Any], data: Any, reason: str) -> None:
    textvqa(tmp_path, row, data=data)
    with pytest.raises(DataError, match=reason):
        formats.read_samples(TEXTVQA, tmp_path, "test")


def test_the_category_of_a_question_is_read_and_kept_by_a_subset(tmp_path: Path) -> None:
    task = suites.load("mllm-cl-ability").task("OCR")
    picture(tmp_path / "OCR_test/a.png")
    picture(tmp_path / "OCR/a.png", 1)
    row = {"question_id": 1, "image": "a.png", "text": "What?", "answer": ["x^2"], "answer_type": "Doc-oriented VQA"}
    listing(tmp_path / task.test, [row, {**row, "question_id": 2, "answer_type": 3}])
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    listing(tmp_path / task.train, [{"image": "a.png", "conversations": talk}])
    samples = formats.read_samples(task, tmp_path, "test")
    assert [sample.category for sample in samples] == ["Doc-oriented VQA", ""]
    assert "1 of 2 references" in formats.usable_flaws(task, samples)
    one = Suite("one", "", (task,), {"paper": ("OCR",)}, {})
    subset.write_subset(one, tmp_path, 2, 0, tmp_path / "small")
    kept = formats.read_samples(suites.load(str(tmp_path / "small")).task("OCR"), tmp_path / "small", "test")
    assert [sample.category for sample in kept] == ["Doc-oriented VQA", ""]
