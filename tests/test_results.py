"""The reference results: the tables are made from the results.json files, and the README says what the tables say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from cnext import methods
from cnext.running import table_formats, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "next-tiny"
STUDY = tables.of_folders(sorted(tables.find([RESULTS])), "lora")


@pytest.mark.parametrize("kind", ["markdown", "csv", "latex", "json"])
def test_the_tables_are_of_these_runs(kind: str) -> None:
    file = RESULTS / f"study.{ {'markdown': 'md', 'latex': 'tex'}.get(kind, kind) }"
    assert file.read_text(encoding="utf-8") == table_formats.FORMATS[kind](STUDY)


def test_every_run_is_there_with_three_seeds() -> None:
    assert STUDY["rows"]
    assert all(row["seeds"] == [0, 1, 2] for row in STUDY["rows"])


def test_the_runs_have_the_methods_present_defaults() -> None:
    for folder in tables.find([RESULTS]):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        defaults = json.loads(json.dumps(dataclasses.asdict(methods.load(results["method"])())))
        assert results["hyperparameters"] == defaults, folder


def test_the_readme_says_what_the_tables_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", text, re.MULTILINE))
    rows = {row["method"]: row for row in STUDY["rows"] if row["order"] == "paper"}
    assert shown.keys() == rows.keys()
    for method, row in rows.items():
        cells = [row[metric] for metric in ("avg_acc", "forgetting", "new_acc")]
        expected = [table_formats.NOTHING if c["mean"] is None else f"{c['mean']:.1f} ± {c['sd']:.1f}" for c in cells]
        assert shown[method].split(" | ")[:3] == expected, method
