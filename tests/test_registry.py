"""A backbone, a scorer and a reader from another package: listed, used in a run, and named where they are broken."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training.toy import change, rows

from cnext import RunConfig, backbones, methods, run
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
    ("group", "name", "found"),
    [
        ("backbones", "tiny", backbones.modules),
        ("scorers", "box", lambda: list(make_scorers())),
        ("readers", "llava", lambda: list(READERS)),
        ("methods", "mage", methods.modules),
    ],
)
def test_a_taken_name_is_named_and_all_others_work(
    installed: Path, group: str, name: str, found: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    installed.write_text("")
    importlib.invalidate_caches()
    before = found()
    register(installed, group, f"{name} = extra_{group}:half\nother = extra:half\nother = another_{group}:half")
    assert sorted(found()) == sorted([*before, "other"])
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(f" {name} of extra_{group}:half is left out: cnext has that name")
    assert said[1].endswith(f" other of another_{group}:half is left out: extra:half has that name")
    found()
    assert not capsys.readouterr().err, "once"


RAISES = [
    "1 / 0",
    "raise SystemExit(3)",
    "raise KeyError('x\\ny')",
    "import nothing_of_this_name",
    "def",
    "x = '\\0'\0",
]


@pytest.mark.parametrize("source", RAISES, ids=["error", "exit", "key", "import", "syntax", "zero"])
def test_a_package_that_does_not_import_stops_nothing_else(
    source: str, installed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed.parents[1]
    (site / "broken").mkdir()
    (site / "broken" / "__init__.py").write_text(source)
    (site / "broken" / "part.py").touch()
    groups = ("methods", "backbones", "scorers", "readers")
    installed.write_text("".join(f"[cnext.{group}]\nbad = broken.part:Bad\n" for group in groups))
    importlib.invalidate_caches()
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("\n  bad ") == 2
    assert main(["card", "lora"]) == 0
    for words in (["card", "bad"], ["run", "--method", "bad"], ["run", "--backbone", "bad"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: the ")
        assert "bad cannot be imported from broken.part" in said
        assert said.count("\n") == 1
    with pytest.raises(UserError, match="the scorer bad cannot be imported"):
        make_scorers()["bad"]
    with pytest.raises(UserError, match="the format bad cannot be imported"):
        READERS["bad"]
    assert callable(make_scorers()["box"])


KINDS = "class Bad:\n    pass\nbad = 3\n"


@pytest.mark.parametrize("group", ["backbones", "scorers"])
@pytest.mark.parametrize("what", ["Bad", "bad"])
def test_something_else_than_was_registered_is_named(installed: Path, group: str, what: str) -> None:
    (installed.parents[1] / "kinds.py").write_text(KINDS)
    register(installed, group, f"bad = kinds:{what}")
    load = backbones.load if group == "backbones" else make_scorers().__getitem__
    with pytest.raises(UserError, match=f"^kinds:{what} is no {group[:-1]} to use as bad: "):
        load("bad")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Bad: pass", "must define one subclass of Method, it defines 0"),
        ("class Bad(Lora):\n    card = None", ""),
        ("class Bad(Method):\n    card = None", "the method bad must be a dataclass with a card, attach and trainable"),
        ("@dataclass\nclass Bad(Method):\n    x: int = 1", "the method bad must be a dataclass with a card, attach"),
    ],
)
def test_a_method_that_is_none_is_named(source: str, said: str, installed: Path) -> None:
    top = "from dataclasses import dataclass\nfrom cnext.methods.base import Method\n"
    top += "from cnext.methods.lora import Lora\n"
    name = f"method_{abs(hash(source))}"
    (installed.parents[1] / f"{name}.py").write_text(top + source)
    register(installed, "methods", f"bad = {name}")
    if said:
        with pytest.raises(UserError, match=said):
            methods.load("bad")
    else:
        assert methods.load("bad").__name__ == "Bad"


@pytest.mark.parametrize("name", sorted(backbones.BACKBONES))
def test_backbones_are_registered_under_their_names(name: str) -> None:
    assert backbones.load(name).name == name
