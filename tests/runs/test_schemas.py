"""Files of a run as typed records: what is refused, with the place in the file, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnext.errors import UserError
from cnext.records import AnyPath, FileName, RelativePath
from cnext.runs import schemas
from cnext.runs.run_folder import RunFolder
from cnext.runs.schemas import Answer, Results, StageScore
from cnext.scoring.base import ERROR_TYPES, PROFILES

RESULTS = {"method": "m", "suite": "s", "tasks": ["A", "B"], "score_matrix": [[1, None], [2.5, 3]], "unknown": 1}
SCORE = {
    "stage": 1, "trained": "A", "task": "A", "scorer": "box", "samples": 2, "strict": 50, "paper": -1.5,
    "errors": dict.fromkeys(PROFILES, dict.fromkeys(ERROR_TYPES, 0.0)),
}  # fmt: skip
ANSWER = {
    "id": "1", "instruction": "", "answer": "", "text": "", "image": None, "source_image": None, "target_image": None,
    "strict": 0, "paper": 0, "error": "other",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given", "change", "message"),
    [
        (Results, RESULTS, {"tasks": ["A", 5]}, r"Expected a name .*, got 5 - at `\$\.tasks\[1\]`"),
        (Results, RESULTS, {"tasks": ["A", "a/b"]}, r"Expected a name .*, got 'a/b' - at `\$\.tasks\[1\]`"),
        (Results, RESULTS, {"tasks": ["A", "A"]}, "Expected distinct tasks"),
        (Results, RESULTS, {"tasks": ["A"]}, "a row a stage at most"),
        (Results, RESULTS, {"zero_shot": [1]}, "rows and averages of its 2 tasks"),
        (
            Results,
            RESULTS,
            {"score_matrix": [[float("nan"), 1]]},
            r"Expected `float` .* at `\$\.score_matrix\[0\]\[0\]`",
        ),
        (Results, RESULTS, {"score_matrix": [[True, 1]]}, r"got `bool` - at `\$\.score_matrix\[0\]\[0\]`"),
        (Results, RESULTS, {"cost": {"stages": [{}]}}, r"missing required field `task` - at `\$\.cost\.stages\[0\]`"),
        (StageScore, SCORE, {"task": "../x"}, r"Expected a name .*, got '\.\./x'"),
        (StageScore, SCORE, {"errors": {"strict": {}}}, "Expected errors of every profile and type"),
        (StageScore, SCORE, {"strict": 1e7}, r"Expected `float` <= 1000000\.0 - at `\$\.strict`"),
        (Answer, ANSWER, {"image": "../x.png"}, r"stays within its folder, got '\.\./x\.png' - at `\$\.image`"),
    ],
)
def test_an_error_names_file_place_and_value(kind: Any, given: dict, change: dict, message: str) -> None:
    assert schemas.convert(given, kind, "file.json")
    with pytest.raises(UserError, match=rf"^file\.json: .*{message}.*; run cnext-run again$"):
        schemas.convert(given | change, kind, "file.json")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (FileName, ["a", "a b", "é" * 100], ["", ".a", "a/b", "a\\b", "a\n", "x" * 101]),
        (AnyPath, ["", "/a/b", "a/../b"], ["a\0", "x" * 256, "/".join("x" * 600)]),
        (RelativePath, ["a", "a/**/b*.json"], ["/a", "\\a", "a/../b", "**/**/x", "a**b"]),
    ],
)
def test_names_and_paths(kind: type, good: list[str], bad: list[str]) -> None:
    assert [value for value in good + bad if kind.fits(value)] == good


def test_a_log_is_cut_without_changing_its_rows(tmp_path: Path) -> None:
    """Rows keep keys and spelling that this version does not know, up to the first row that is incomplete."""
    rows = [
        json.dumps({**SCORE, "stage": stage, "later": [1.50]}, indent=None, separators=(",", ": "))
        for stage in (0, 1, 2)
    ]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "scores.jsonl").write_text("\n".join([*rows, '{"stage": 1']) + "\n")
    folder = RunFolder(tmp_path, {})
    folder.cut(1, (1, 0), lambda line: None)
    assert [row.strict for row in folder.scored.rows] == [50, 50]
    assert (tmp_path / "scores.jsonl").read_text() == "\n".join(rows[:2]) + "\n"
    folder.log_score(StageScore(**SCORE))
    assert json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[-1]) == {**SCORE, "predictions": None}
    folder.close()
