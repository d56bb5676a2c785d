"""Names that the paper writes work wherever a method is named, and runs go by one name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnext import RunConfig, methods
from cnext.cli import main, run_main
from cnext.errors import UserError


@pytest.mark.parametrize(
    ("written", "name"),
    [("EW+GA", "ew-ga"), ("4-Split", "ew-ga"), ("2-split", "two-split"), ("joint", "upper-bound"), ("MAGE", "mage")],
)
def test_a_name_of_the_paper_is_its_method(written: str, name: str, tmp_path: Path) -> None:
    assert methods.canonical(written) == name
    assert methods.load(written) is methods.load(name)
    config = RunConfig(method=written, out=tmp_path)
    assert config.method == name
    assert config.folder == tmp_path / name / "paper" / "seed-0"


def test_every_alias_is_of_a_method_and_no_method_itself() -> None:
    assert set(methods.ALIASES.values()) <= set(methods.modules())
    assert not set(methods.ALIASES) & set(methods.modules())


def test_an_unknown_name_is_quoted_as_it_was_given() -> None:
    assert methods.canonical("EW+XY") == "EW+XY"
    with pytest.raises(UserError, match=r"unknown method 'EW\+XY'; valid: .*ew-ga"):
        methods.load("EW+XY")


def test_the_list_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  ew-ga ") and line.endswith("(also: ew+ga, 4-split)") for line in shown)


def test_flags_go_by_the_methods_own_name(tmp_path: Path, toy_suite: Path, data: Path) -> None:
    flags = ["--order", "VQAv2", "--suite", str(toy_suite), "--data", str(data), "--out", str(tmp_path)]
    assert run_main(["--method", "EW+GA", "--ew-ga.rank", "2", *flags]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ew-ga"]
    assert '"method": "ew-ga"' in (tmp_path / "ew-ga/VQAv2/seed-0/config.json").read_text()


def test_two_names_of_one_method_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--method", "ew-ga", "4-split"]) == 2
    assert "--method has ew-ga more than once" in capsys.readouterr().err


def test_a_baseline_has_the_names_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--method", "mage", "--baseline", "2-split", "--out", str(tmp_path)]) == 2
    assert "unknown baseline 'two-split'; valid: mage" in capsys.readouterr().err
