"""``cnext-run --help``: two screens, of what is declared and of nothing else, at once."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cnext.cli import run_main
from cnext.studies import short_help
from cnext.studies.flags import Flags

SCREEN = 40
"""Lines of a screen."""


@pytest.fixture
def full(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        run_main(["--help-all"])
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_it_fits_two_screens(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["--help"], ["-h"], ["--method", "none", "--help"]):
        assert run_main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 2 * SCREEN
        assert max(map(len, lines)) <= min(columns, 100)
        assert not [line for line in lines if line != line.rstrip()]


def test_every_flag_is_explained_or_named_once(full: str) -> None:
    """A flag that is new is put in a group: shown here, or by --help-all alone."""
    grouped = [name for names in (*short_help.SHOWN.values(), *short_help.NAMED.values()) for name in names]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(Flags))
    shown = short_help.text(100)
    flags = set(re.findall(r"--[a-z][a-z-]*", shown))
    assert flags == {f"--{name.replace('_', '-')}" for name in grouped} | {"--mage"}
    assert flags <= set(re.findall(r"--[a-z][a-z-]*", full))
    for names in short_help.NAMED.values():
        assert not [name for name in names if f"\n  --{name.replace('_', '-')} " in shown]


def test_it_says_what_is_declared(full: str) -> None:
    declared, told = short_help.declared(), " ".join(short_help.text(100).split())
    assert declared.keys() == {field.name for field in dataclasses.fields(Flags)}
    full = " ".join(full.replace("│", " ").split())
    for names in short_help.SHOWN.values():
        for name in names:
            text = declared[name].text
            assert text in full, name
            assert text.partition(". None:")[0].rstrip(".") in told, name
    for flag, default in {
        "method STR ...": "mage",
        "seeds INT ...": "0",
        "suite STR": "next-tiny",
        "out PATH": "runs",
        "split {test,validation,reworded}": "test",
        "log {jsonl,tensorboard,wandb} ...": "jsonl",
    }.items():
        assert re.search(rf"--{re.escape(flag)} ((?! --).)*\(default: {default}\)", told), flag
    assert "(default: None)" not in told
    assert " ".join(inspect.getdoc(Flags).split()) in told


def test_it_loads_neither_torch_nor_the_parser() -> None:
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'tyro', 'msgspec', 'yaml', 'rich'}"
    code = f"import sys; from cnext import cli; cli.run_main(['--help']); assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)
