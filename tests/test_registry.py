"""A backbone, a scorer and a reader from another package: listed, used in a run, and named where they are broken."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
from training.toy import change, rows

from cnext import RunConfig, backbones, run
from cnext.cli import main
from cnext.errors import UserError
from cnext.scoring import make_scorers
from cnext.tasks.readers import READERS

SOURCE = '''
from cnext.backbones.tiny.model import TinyBackbone
from cnext.scoring.base import Score
from cnext.tasks.base import Sample, Turn


class Renamed(TinyBackbone):
    """The tiny backbone under another name.

    Its second paragraph.
    """


def half(task, samples, predictions):
    return [Score(50.0, 25.0, "other") for _ in samples]


def questions(row, root, name, origin):
    question, answer = row.get("data") or (row["text"], row.get("answer", ""))
    return Sample(name, (Turn(question, answer),), root / row["image"], origin=origin)
'''
POINTS = {
    "backbones": "renamed = extra:Renamed",
    "scorers": "half = extra:half",
    "readers": "questions = extra:questions",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with the package as pip installs it. Returns its list of entry points."""
    metadata = tmp_path / "site" / "extra-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 0.1\n")
    points = metadata / "entry_points.txt"
    points.write_text("".join(f"[cnext.{group}]\n{point}\n" for group, point in POINTS.items()))
    (tmp_path / "site" / "extra.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    return points


def register(points: Path, group: str, point: str) -> None:
    points.write_text(f"[cnext.{group}]\n{point}\n")
    importlib.invalidate_caches()


def test_a_run_uses_all_three(installed: Path, data: Path, toy_suite: Path, tmp_path: Path) -> None:
    suite = shutil.copytree(toy_suite, tmp_path / "suite")
    change(suite / "VQAv2.json", format="questions", scorer="half")
    options = {"suite": str(suite), "data": data, "order": "VQAv2", "out": tmp_path / "runs", "device": "cpu"}
    config = RunConfig(method="lora", backbone="renamed", **options)
    run(config)
    results = json.loads((config.folder / "results.json").read_text())
    assert results["backbone"] == "renamed"
    assert [row["strict"] for row in rows(config.folder / "scores.jsonl")] == [50.0] * 2


def test_list_has_the_first_line_of_the_docstring(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    assert "renamed        The tiny backbone under another name\n" in capsys.readouterr().out


@pytest.mark.parametrize("point", ["half = extra:gone", "half = gone:half", "half = extra"])
def test_what_cannot_be_imported_is_named(installed: Path, point: str) -> None:
    register(installed, "scorers", point)
    scorers = make_scorers()
    assert "half" in scorers
    assert callable(scorers["box"])
    with pytest.raises(
        UserError, match=f"the scorer half cannot be imported from {point.partition(' = ')[2]}, expected"
    ):
        scorers["half"]


@pytest.mark.parametrize(
    ("group", "name", "use"),
    [
        ("backbones", "tiny", backbones.modules),
        ("scorers", "box", lambda: list(make_scorers())),
        ("readers", "llava", lambda: list(READERS)),
    ],
)
def test_a_name_of_cnext_cannot_be_taken(installed: Path, group: str, name: str, use) -> None:
    register(installed, group, f"{name} = extra:half")
    with pytest.raises(UserError, match=f"registers a .* as {name}, which cnext has; it needs another name"):
        use()


@pytest.mark.parametrize("name", sorted(backbones.BACKBONES))
def test_backbones_are_registered_under_their_names(name: str) -> None:
    assert backbones.load(name).name == name
