"""Score matrices from files, well and badly formed, and their metrics as text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cnext.errors import UserError
from cnext.scoring import published
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix import FORMULAS, REFERENCE_FORMULAS, metrics, points
from cnext.scoring.matrix_file import ScoreRecord, from_json, read
from cnext.scoring.metrics_text import NEEDS, metrics_text

ROWS = [[60.0, 5.0, None], [50.0, 70.0, None], [40.0, 65.5, 80.0]]
CSV = {
    "bare": "60,5,\n50,70,\n40,65.5,80\n",
    "header": "A,B,C\n60,5,\n50,70,\n40,65.5,80\n",
    "header and labels": "after,A,B,C\nA,60,5,\nB,50,70,\nC,40,65.5,80\n",
    "index of a data frame": ",A,B,C\n0,60.0,5.0,\n1,50.0,70.0,\n2,40.0,65.5,80.0\n",
    "counted rows under a name": "stage,A,B,C\n1,60,5,\n2,50,70,\n3,40,65.5,80\n",
    "labels alone": "one,60,5,\ntwo,50,70,\nthree,40,65.5,80\n",
    "spaces, quotes, blank lines, a mark": '\ufeff"A", B ,C\r\n\r\n 60 ,5, \r\n50,"70",\r\n4e1,65.5,80.\r\n\r\n',
}
ZERO_SHOT_CSV = {
    "header": "task,A,B,C\nZero-Shot,1,2,3\nA,60,5,\nB,50,70,\nC,40,65.5,80\n",
    "no header": "zero-shot,1,2,3\n1,60,5,\n2,50,70,\n3,40,65.5,80\n",
    "the only label": "zero shot,1,2,3\n,60,5,\n,50,70,\n,40,65.5,80\n",
}


def written(folder: Path, text: str, name: str = "matrix.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "zero_shot"),
    [*((text, None) for text in CSV.values()), *((text, [1, 2, 3]) for text in ZERO_SHOT_CSV.values())],
    ids=[*CSV, *(f"zero-shot row, {name}" for name in ZERO_SHOT_CSV)],
)
def test_csv(text: str, zero_shot: list[float] | None, tmp_path: Path) -> None:
    given = read(written(tmp_path, text))
    assert given.matrix.to_rows() == ROWS
    assert given.zero_shot == zero_shot
    assert given.tasks == (["A", "B", "C"] if "A" in text else ["1", "2", "3"])


def test_an_unfinished_csv(tmp_path: Path) -> None:
    given = read(written(tmp_path, "A,B,C\n60,5,\n50,70,\n"))
    assert len(given.matrix) == 3
    assert given.matrix.stages_done == 2
    assert read(written(tmp_path, "A,B,C\n60,5,\n50,70,\n,,\n")).matrix == given.matrix


def test_json_rows_are_csv_rows(tmp_path: Path) -> None:
    assert read(written(tmp_path, json.dumps(ROWS), "matrix.json")) == read(written(tmp_path, CSV["bare"]))


def test_json_with_all_that_there_is(tmp_path: Path) -> None:
    shares = {kind: [[None] * 3 for _ in range(3)] for kind in ERROR_TYPES}
    for t, i in ((0, 0), (1, 1), (2, 0), (2, 1), (2, 2)):
        shares["other"][t][i] = 100 - ROWS[t][i]
        shares["hallucination"][t][i] = shares["instruction_unfollowing"][t][i] = 0
    rows = [[60, 5, 4], [50, 70, 6], [40, 65.5, 80]]
    given = {
        "tasks": ["A", "B", "C"],
        "zero_shot": [1, 2, 3],
        "score_matrix": rows,
        "writes": {"A": ["text"], "B": ["image"], "C": ["text"]},
        "error_matrix": shares,
        "joint": [70, 70, 70],
        "single": [65, 75, 85],
        "chance": [0, 1, 2],
        "held_out": {"before": [50], "after": [45]},
        "anything": "else",
    }
    record = read(written(tmp_path, json.dumps(given), "all.JSON"))
    found = record.metrics()
    assert list(found) == [*FORMULAS, *REFERENCE_FORMULAS]
    assert None not in found.values()
    assert found["fwt"] == pytest.approx(((5 - 2) + (6 - 3)) / 2)
    assert found["avg_oth"] == pytest.approx(found["forgetting"])
    text = metrics_text(record)
    assert "not computed" not in text
    for name, value in found.items():
        if name in ("bwt", "forgetting_peak"):
            continue
        formula = (FORMULAS | REFERENCE_FORMULAS)[name]
        assert any(line.split()[:2] == [name, points(value)] and line.endswith(formula) for line in text.splitlines())
    assert "60.00 60.00 61.83" in text


def test_what_a_run_measures_apart_is_read() -> None:
    rows = [[60, None, None], [50, 70, None], [40, 65.5, 80]]
    given = {"score_matrix": rows, "zero_shot": [1, 2, 3], "before_learnt": [None, 5, 6]}
    held_out = {"tasks": ["S"], "scores": [[50], None, [45]]}
    found = from_json(given | {"held_out": held_out | {"before": [50], "after": [45]}}, "results.json").metrics()
    assert (found["fwt"], found["zero_shot_retention"]) == (3.0, -5.0)
    without_ends = from_json(given | {"held_out": held_out}, "results.json").metrics()
    assert (without_ends["fwt"], without_ends["zero_shot_retention"]) == (3.0, None)


@pytest.mark.parametrize("joint", [False, True])
def test_the_flag_joint_of_a_run_is_no_list_of_scores(joint: bool) -> None:
    record = from_json({"score_matrix": ROWS, "joint": joint, "chance": None, "error_matrix": None}, "file")
    assert record.references == {}


def test_missing_metrics_are_named_with_their_input() -> None:
    record = from_json([[60.0, None], [50.0, 70.0]], "file")
    shown, _, left_out = metrics_text(record).partition("not computed, and the input that is missing:")
    assert "= -bwt" in shown
    for name, value in record.metrics().items():
        if name in ("bwt", "forgetting_peak"):
            assert f"\n{name} " not in shown
            continue
        assert (f"\n{name} " in shown) == (value is not None), name
        assert (f" {name}:" in left_out or f" {name}," in left_out) == (value is None), name


def test_the_peak_is_shown_where_a_last_score_is_the_best() -> None:
    record = from_json([[60.0, None], [65.0, 70.0]], "file")
    values = {line.split()[0]: line.split()[1] for line in metrics_text(record).splitlines() if line}
    assert (values["forgetting_max"], values["forgetting_peak"]) == ("-5.00", "0.00")


def test_every_metric_that_can_be_missing_names_its_input() -> None:
    named = [name for names in NEEDS.values() for name in names]
    shown = [name for name in FORMULAS | REFERENCE_FORMULAS if name not in ("bwt", "forgetting_peak")]
    assert sorted([*named, "avg_acc", "worst_acc"]) == sorted(shown)


def test_the_final_row_alone_of_the_paper() -> None:
    paper = published.continual_next()
    tasks = paper["conditions"]["tasks"]
    record = ScoreRecord(tasks, published.score_matrix(paper, "upper-bound"))
    text = metrics_text(record)
    assert "stage averages        - - - - - 53.31" in text
    assert "each task's score when learnt, and two stages" in text


FRACTIONS = [[0.6, 0.05, None], [0.5, 0.7, None], [0.4, 0.655, 0.8]]


def fractions(value: object) -> object:
    """Every number of a JSON value in hundredths."""
    if isinstance(value, dict):
        return {key: fractions(item) for key, item in value.items()}
    if isinstance(value, list):
        return [fractions(item) for item in value]
    return value / 100 if isinstance(value, int | float) else value


def test_fractions_are_refused_or_read_as_told(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(FRACTIONS), "matrix.json")
    with pytest.raises(
        UserError, match=r"all scores are at most 1: give --scale fraction .* or --scale percent"
    ) as said:
        read(path)
    assert "\n" not in str(said.value)
    assert read(path, "percent").matrix.to_rows() == FRACTIONS
    found = read(path, "fraction").matrix.to_rows()
    assert [[value and round(value, 9) for value in row] for row in found] == ROWS


def test_everything_in_a_file_is_of_one_scale(tmp_path: Path) -> None:
    shares = {kind: [[40 / 3] * 1] for kind in ERROR_TYPES}
    percent = {
        "score_matrix": [[60]],
        "zero_shot": [10],
        "error_matrix": shares,
        "joint": [70],
        "single": [65],
        "chance": [5],
        "held_out": {"before": [50], "after": [45]},
    }
    expected = read(written(tmp_path, json.dumps(percent), "matrix.json")).metrics()
    found = read(written(tmp_path, json.dumps(fractions(percent)), "matrix.json"), "fraction").metrics()
    assert found == pytest.approx(expected)
    assert found["zero_shot_retention"] == pytest.approx(-5)


@pytest.mark.parametrize("scores", ["0,\n0,0\n", "0.5,\n1,1.5\n", "100,\n0,0.3\n"], ids=["none", "above one", "large"])
def test_what_can_only_be_percent_is_read(scores: str, tmp_path: Path) -> None:
    assert read(written(tmp_path, scores)) == read(written(tmp_path, scores), "percent")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("A,B\n0.5,\n60,70\n", "row 2, column 1"),
        ("x,A,B\nzero-shot,1.5,0\nA,0.5,\nB,0.6,0.7\n", "zero-shot, column 1"),
    ],
)
def test_what_is_no_fraction_is_refused(text: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{where}: expected a fraction from 0 to 1, got"):
        read(written(tmp_path, text), "fraction")


def test_a_run_is_in_percent_however_low_its_scores(tmp_path: Path) -> None:
    """Also where its folder is given."""
    written(tmp_path, '{"method": "lora", "profile": "strict", "score_matrix": [[0.5]]}', "results.json")
    for path in (tmp_path, tmp_path / "results.json"):
        assert read(path).matrix.to_rows() == [[0.5]]
        with pytest.raises(UserError, match="the scores of a run are in percent; leave out --scale"):
            read(path, "fraction")


BAD_CSV = {
    "empty": ("", "matrix.csv: expected scores, got an empty file"),
    "blank": ("\n  \n\n", "matrix.csv: expected scores, got an empty file"),
    "one empty cell": ('""\n', "matrix.csv: expected scores, got empty lines alone"),
    "ragged": ("60,,\n50,70\n", "matrix.csv, line 2: expected 3 cells as in line 1, got 2; leave empty what was not"),
    "word": ("A,B\n60,\n50,x7\n", 'matrix.csv, line 3, column 2: expected a score in percent, or nothing .* got "x7"'),
    "dash": ("A,B\n60,-\n50,7\n", 'line 2, column 2: expected a score in percent, or nothing .* got "-"'),
    "nan": ("60,nan\n50,7\n", 'line 1, column 2: expected a score in percent, or nothing .* got "nan"'),
    "percent sign": ("a,60%,\nb,50,7\n", 'line 1, column 2: expected a score in percent, or nothing .* got "60%"'),
    "above 100": ("60,\n50,100.5\n", "line 2, column 2: expected a score in percent, from 0 to 100, got 100.5"),
    "negative": ("x,60,\ny,-1,5\n", "line 2, column 2: expected a score in percent, from 0 to 100, got -1"),
    "too many rows": ("60,\n50,70\n40,60\n", "expected 1 to 2 rows of scores, as many as tasks at most, got 3; a row"),
    "header alone": ("A,B\n", "expected 1 to 2 rows of scores, .* got 0"),
    "zero-shot alone": ("zero-shot,1,2\n", "expected 1 to 2 rows of scores, .* got 0"),
    "late zero-shot": (
        "a,60,\nb,50,7\nzero-shot,1,2\n",
        "expected the row labelled zero-shot first, got a, b, zero-shot",
    ),
    "other order": (",A,B\nB,60,\nA,50,7\n", "in the same order, that of training, got rows B, A and columns A, B"),
    "same names": ("A,A\n60,\n50,7\n", r'line 1: expected a list of distinct names, got \["A", "A"\]'),
    "labels alone": ("a\nb\n", "line 1: expected a column a task, with commas between, got 'a' alone"),
    "semicolons": ("A;B\n60;\n50;7\n", "line 1: expected a column a task, with commas between, got 'A;B' alone"),
    "no whole row": (",5\n50,\n", "expected a row t with a score on every task up to task t, found none"),
    "quote": ('A,B\n"60,5\n', "line 2: expected cells between commas, got unexpected end of data"),
}
BAD_JSON = {
    "empty": ("", "matrix.json: expected scores, got an empty file"),
    "cut off": ("[[60, null],\n [50, 7", r"expected JSON, got something else \(.*line 2 column 8"),
    "number": ("5", 'expected a list of rows, or an object with one as "score_matrix", got 5'),
    "no rows": ("[]", "expected a list of rows, .* got a list of 0"),
    "empty row": ("[[]]", r"tasks: expected a list of distinct names, got \[\]"),
    "no matrix": (
        '{"tasks": ["A"]}',
        'expected a list of rows, or an object with one as "score_matrix", got an object',
    ),
    "triangle": (
        "[[60], [50, 7]]",
        "score_matrix, row 1: expected a list of 2 scores, null where not .* got a list of 1",
    ),
    "too many rows": ("[[60], [50]]", "score_matrix: expected a list of 1 to 1 rows, one a stage, got a list of 2"),
    "row of no list": ("[[60, 5], 7]", "score_matrix, row 2: expected a list of 2 scores, .* got 7"),
    "word": ('[[60, "x"], [50, 7]]', 'score_matrix, row 1, column 2: expected a score in percent, .* got "x"'),
    "boolean": ("[[true]]", "score_matrix, row 1, column 1: expected a score in percent, .* got true"),
    "nan": ("[[NaN]]", "score_matrix, row 1, column 1: expected a score in percent, from 0 to 100, got nan"),
    "above 100": ("[[101]]", "score_matrix, row 1, column 1: expected a score in percent, from 0 to 100, got 101"),
    "tasks": (
        '{"tasks": ["A", 2], "score_matrix": [[60]]}',
        r'tasks: expected a list of distinct names, got \["A", 2\]',
    ),
    "more tasks": ('{"tasks": ["A", "B"], "score_matrix": [[60]]}', "row 1: expected a list of 2 scores"),
    "zero-shot": (
        '{"score_matrix": [[60]], "zero_shot": [1, 2]}',
        "zero_shot: expected a list of 1 scores, .* got a list of 2",
    ),
    "joint": ('{"score_matrix": [[60]], "joint": [null]}', "joint, column 1: expected a score, got null"),
    "writes": ('{"score_matrix": [[60]], "writes": ["text"]}', 'writes: expected an object with a list for "1"'),
    "modality": (
        '{"score_matrix": [[60]], "writes": {"1": [["text"]]}}',
        "writes, 1: expected a list of distinct names",
    ),
    "shares": (
        '{"score_matrix": [[60]], "error_matrix": {}}',
        'error_matrix: expected an object with a list for "hall',
    ),
    "held out": (
        '{"score_matrix": [[60]], "held_out": {"before": [1], "after": [1, 2]}}',
        "held_out: expected a list of 1",
    ),
}


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [(suffix, *case) for suffix, cases in (("csv", BAD_CSV), ("json", BAD_JSON)) for case in cases.values()],
    ids=[f"{suffix}, {name}" for suffix, cases in (("csv", BAD_CSV), ("json", BAD_JSON)) for name in cases],
)
def test_a_bad_file_is_one_message(suffix: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(written(tmp_path, text, f"matrix.{suffix}")).metrics()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "none.csv: expected a file, found nothing; correct the path"),
        ("matrix.xlsx", "expected a score matrix in a .csv or .json file"),
        ("run", "expected a score matrix in a .csv or .json file; of a run, give its results.json"),
    ],
)
def test_a_file_that_is_none(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "matrix.csv").write_bytes("60,5\n".encode("utf-16"))
    with pytest.raises(UserError, match="expected text in UTF-8, got invalid start byte at byte 0"):
        read(tmp_path / "matrix.csv")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_whatever_a_file_holds_it_is_read_or_refused(suffix: str, tmp_path: Path) -> None:
    """A thousand mutations of a good file: no other error than UserError, and never a score outside of 0 to 100."""
    draw = random.Random(0)
    paper = published.continual_next()
    good = json.dumps({"tasks": paper["conditions"]["tasks"], **paper["methods"]["lora"]})
    good = good if suffix == "json" else ZERO_SHOT_CSV["header"]
    refused = 0
    for _ in range(1000):
        text = list(good)
        for _ in range(draw.randint(1, 3)):
            text[draw.randrange(len(text))] = draw.choice(
                ["", ",", "\n", '"', "-", "9", "null", "[", "}", "e", "\0", " "]
            )
        try:
            record = read(written(tmp_path, "".join(text), f"matrix.{suffix}"))
            assert all(cell is None or 0 <= cell <= 100 for row in record.matrix.to_rows() for cell in row)
            assert metrics(record.matrix)["avg_acc"] is not None
            metrics_text(record)
        except UserError:
            refused += 1
    assert 100 < refused < 1000
