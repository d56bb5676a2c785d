"""Figures of runs and studies as files: which, in what order, what they hold, and that they are the same each time."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from report.fake_run import ORDER, write_fake_run

from cnext.analysis.run import Run
from cnext.cli import main
from cnext.errors import UserError
from cnext.report import SECTIONS, plots, study_plots
from cnext.report.figures import CAPTIONS, COLUMN, write_figures
from cnext.report.scores import matrix

TASKS = ("VQAv2", "HQEdit")
STEMS = ["score_matrix", "stages_0", "stages_1", "stages_2", "errors_1", "errors_2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, each with a run of two tasks."""
    place = tmp_path_factory.mktemp("figures")
    for method in ("lora", "mage"):
        write_fake_run(place / method / "seed-0", TASKS, method=method, samples=4)
    return place


@pytest.fixture(scope="module")
def run(runs: Path) -> Path:
    return runs / "mage/seed-0"


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_figures_of_a_run_are_those_of_its_report_in_its_order(run: Path, tmp_path: Path) -> None:
    """Without the sample images, which are no figures."""
    found = names(write_figures([run], tmp_path / "out", ["svg"]))
    shown = [picture.name for build in SECTIONS for picture in build(Run.read(run)).pictures()]
    assert found[:-1] == [name for name in shown if name in found]
    assert {f"{stem}.svg" for stem in STEMS} <= {*found}
    assert not [name for name in found if name.endswith(".png")]
    assert any(name.endswith(".png") for name in shown)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(found)


def test_every_figure_has_a_caption(run: Path, tmp_path: Path) -> None:
    files = names(write_figures([run], tmp_path, ["svg"], ["score_matrix", "errors"]))
    text = (tmp_path / CAPTIONS).read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [Path(name).stem for name in files[:-1]]
    for part in text.split("## ")[1:]:
        name, caption, words = part.strip().split("\n\n")
        assert len(caption) > 40, name
        assert words.startswith("In words: ")


def test_names_choose_figures(run: Path, tmp_path: Path) -> None:
    found = names(write_figures([run], tmp_path, ["pdf", "svg"], ["stages_1", "score_matrix"]))
    assert found == ["score_matrix.pdf", "score_matrix.svg", "stages_1.pdf", "stages_1.svg", CAPTIONS]


def test_vector_files_hold_text_as_text(run: Path, tmp_path: Path) -> None:
    write_figures([run], tmp_path, ["pdf", "svg"], ["score_matrix"])
    pdf, svg = ((tmp_path / f"score_matrix.{kind}").read_bytes() for kind in ("pdf", "svg"))
    assert pdf.startswith(b"%PDF-")
    assert b"/CIDFontType2" in pdf or b"/TrueType" in pdf
    assert b"/Type3" not in pdf
    words = {element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {*TASKS, "average"} <= words
    assert b"<style>@media" not in svg
    assert b"prefers-color-scheme" not in svg, "a figure in a document is not dark"


def test_files_are_the_same_each_time(run: Path, tmp_path: Path) -> None:
    """Also in another process, with other hashes; no date, program or version is in them."""
    chosen = ["score_matrix", "errors_1"]
    here = write_figures([run], tmp_path / "here", list(plots.FILES), chosen)
    words = ["plot", str(run), "--to", str(tmp_path / "there"), "--figures", *chosen, "--format", *plots.FILES]
    code = f"import sys; from cnext.cli import main; sys.exit(main({words!r}))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL, env=environment
    )
    for path in here:
        content = path.read_bytes()
        assert content == (tmp_path / "there" / path.name).read_bytes(), path.name
        assert not re.search(rb"CreationDate|<dc:date>|Software|Producer|Creator", content), path.name


def test_figures_fit_a_column(runs: Path, tmp_path: Path) -> None:
    """The score matrix of six tasks too; a wider column is used where it helps."""
    drawn = plots.score_matrix(np.full((7, 6), 88.8), ["0 zero-shot", *ORDER], ORDER, range(1, 7))
    widths = []
    for column in (COLUMN, 6.0):
        with Image.open(io.BytesIO(drawn.as_file("png", column))) as image:
            assert round(image.info["dpi"][0]) == 300
            assert image.convert("L").getextrema()[0] < 100, "something is drawn"
            widths.append(image.width / 300)
    assert COLUMN - 0.3 < widths[0] <= COLUMN + 0.05
    assert 5.5 < widths[1] <= 6.05
    for path in write_figures([runs], tmp_path, ["png"])[:-1]:
        with Image.open(path) as image:
            assert image.width / 300 <= COLUMN + 0.05, path.name


def test_drawing_for_a_document_leaves_the_page_as_it_is(run: Path, tmp_path: Path) -> None:
    def page() -> bytes:
        return matrix(Run.read(run)).pictures()[0].data

    before = page()
    write_figures([run], tmp_path, ["svg"], ["score_matrix"])
    assert page() == before
    assert before != (tmp_path / "score_matrix.svg").read_bytes()


def test_a_document_has_the_key_of_error_types_in_the_figure() -> None:
    shares = {"mage": dict.fromkeys(plots.ERROR_COLOURS, 4.0)}
    for picture in (plots.errors(shares, "VQAv2"), study_plots.error_types(shares, "errors")):
        text = picture.as_file("svg", COLUMN).decode()
        assert all(f">{error.replace('_', ' ')}<" in text for error in plots.ERROR_COLOURS)


def test_the_figures_of_a_study(runs: Path, tmp_path: Path) -> None:
    found = names(write_figures([runs], tmp_path, ["svg"]))
    groups = list(dict.fromkeys(re.sub(r"(_\d+)?\.svg$", "", name) for name in found))
    assert groups[0] == "avg_acc"
    assert {"accuracy", "forgetting", "transfer"} <= {*groups}


def test_the_verb_prints_its_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "figures"
    assert main(["plot", str(run), "--to", str(out), "--figures", "score_matrix"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "score_matrix.pdf"), str(out / CAPTIONS)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["RUN", "--figures", "stage"],
            "unknown figure 'stage'; did you mean stages? valid: score_matrix, stages, err",
        ),
        (["RUN", "--figures", "xyz"], "unknown figure 'xyz'; valid: score_matrix, stages, errors"),
        (["RUN", "--width", "0"], "--width: expected a width from 1 to 20 inches, got 0"),
        (["RUN", "--width", "nan"], "--width: expected a width from 1 to 20 inches, got nan"),
        (["."], ". is no run folder and holds none"),
        (["RUN", "--to", "file"], "File exists: file"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = [str(run) if word == "RUN" else word for word in words]
    assert main(["plot", *given[:1], "--to", "out", *given[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not Path("out").exists()


def test_a_run_without_a_stage_has_no_figure(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    with pytest.raises(UserError, match=r"results\.json: no such file; give a folder in which cnext-run has evaluated"):
        write_figures([tmp_path / "run"], tmp_path / "out")
