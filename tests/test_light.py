"""A plain installation, without extras: what runs, what is imported, and what is said about the rest."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import light
import pytest
from packaging.requirements import Requirement

from cnext import packages
from cnext.cli import main, run_main
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "next-tiny"
VERB = "from cnext.cli import main; sys.exit(main(sys.argv[1:]))"
HEAVY = ("torch", "numpy", "transformers", "matplotlib", "PIL", "rich", "msgspec", "tyro", "safetensors", "psutil")


def test_importing_cnext_imports_nothing_heavy_and_takes_a_moment() -> None:
    """Documented as at most 0.1 s; the bound here is what a loaded machine may take."""
    code = (
        "import sys, time; start = time.perf_counter(); import cnext; took = time.perf_counter() - start; dir(cnext);"
        f"print(took, *(name for name in {HEAVY} if name in sys.modules))"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True, cwd=HERE).split() for _ in range(2)]
    assert [names for _, *names in runs] == [[], []]
    assert min(float(took) for took, *_ in runs) < 1


def test_tables_and_metrics_need_neither_torch_nor_numpy_extras(tmp_path: Path) -> None:
    """With results that are in the repository."""
    run, matrix = RESULTS / "mage" / "paper" / "seed-0", tmp_path / "matrix.csv"
    matrix.write_text("a,b\n50,\n40,60\n")
    for words, expected in (
        (("metrics", matrix), "avg_acc"),
        (("metrics", run / "results.json", "--json"), '"forgetting"'),
        (("compare", run, "--to", RESULTS / "mage" / "paper" / "seed-1"), "avg_acc"),
        (("compare", run, "--paper", "mage-paper", "--anyway"), "avg_acc"),
        (("table", RESULTS / "mage", RESULTS / "lora", "--mix-environments"), "| lora"),
    ):
        done = light.run(VERB, *words, without=("torch",))
        assert (done.returncode, expected in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_default_run_without_extras_is_the_one_with_them(toy_suite: Path, data: Path, tmp_path: Path) -> None:
    """To the bit; and its report says where its figures are."""
    words = ("run", "--method", "mage", "--suite", toy_suite, "--data", data, "--threads", "1", "--order", "Flickr30k")
    done = light.run(VERB, *words, "--out", tmp_path / "light")
    assert done.returncode == 0, done.stderr
    assert run_main([*map(str, words[1:]), "--out", str(tmp_path / "full")]) == 0
    runs = [next((tmp_path / name).rglob("results.json")).parent for name in ("light", "full")]
    for file in ("scores.jsonl", "train.jsonl"):
        rows = [[json.loads(line) for line in (run / file).read_text().splitlines()] for run in runs]
        for row in (one for listed in rows for one in listed):
            for name in [name for name in row if "second" in name]:
                del row[name]
        assert rows[0] == rows[1], file
    pages = [re.findall(r"data:image/svg\+xml,([^\"]+)", (run / "report.html").read_text()) for run in runs]
    figures = [[unquote(html.unescape(one)) for one in page] for page in pages]
    assert figures[0]
    assert all("pip install 'cnext[report]', then cnext report RUN" in one for one in figures[0])
    assert figures[1]
    assert not any("Figure left out" in one for one in figures[1])
    assert "note: the report has no figures" in done.stderr


@pytest.mark.parametrize("backbone", packages.NEEDED_BY)
def test_a_backbone_of_an_extra_is_refused_in_a_line_before_anything_is_done(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = packages.version
    monkeypatch.setattr(packages, "version", lambda name: None if name in packages.EXTRAS else real(name))
    monkeypatch.chdir(tmp_path)
    assert run_main(["--method", "lora", "--backbone", backbone, "--weights", "nowhere"]) == 2
    needs = ", ".join(packages.NEEDED_BY[backbone])
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"error: --backbone {backbone} needs {needs}, not installed here: pip install 'cnext[{backbone}]'"
    assert not list(tmp_path.iterdir())
    assert main(["doctor", "--backbone", backbone, "--weights", "nowhere"]) == 1
    shown = capsys.readouterr().out
    assert re.search(rf"! transformers +not installed.*\n +-> pip install 'cnext\[{backbone}\]'", shown)


def test_what_else_an_extra_is_for_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = packages.version
    monkeypatch.setattr(packages, "version", lambda name: None if name in packages.EXTRAS else real(name))
    with pytest.raises(UserError, match=r"CLIP openai/ViT-B-32 needs open_clip_torch.*pip install 'cnext\[clip\]'$"):
        plan(RunConfig(method="lora", clip="openai/ViT-B-32"))
    (tmp_path / "config.json").write_text("{}")
    assert main(["import", str(tmp_path), "--to", str(tmp_path / "to")]) == 2
    assert "cnext import needs torchvision, transformers, not installed here: pip install 'cnext[hf]'" in (
        capsys.readouterr().err
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert run_main(["--method", "lora", "--out", str(tmp_path / "runs")]) == 2
    assert (
        "a run in several processes needs accelerate, not installed here: pip install 'cnext[hf]'"
        in capsys.readouterr().err
    )


def test_every_package_is_in_the_extra_that_is_named_for_it() -> None:
    assert packages.EXTRAS.keys() >= {name for names in packages.NEEDED_BY.values() for name in names}
    for name, extra in packages.EXTRAS.items():
        assert light.normal(name) in light.required("cnext", extra) - light.required("cnext"), (name, extra)
    for backbone, names in packages.NEEDED_BY.items():
        assert {*map(light.normal, names)} <= light.required("cnext", backbone)
    assert {*map(light.normal, packages.EVERY_RUN)} <= light.required("cnext")


def test_all_and_test_have_every_extra_of_users() -> None:
    provided = importlib.metadata.metadata("cnext").get_all("Provides-Extra") or []
    mine = {light.normal(one) for one in provided} - {"all", "test", "test-real", "check", "docs"}
    lines = map(Requirement, importlib.metadata.requires("cnext") or [])
    held = {(str(line.marker).rpartition('"')[0].rpartition('"')[2], *line.extras) for line in lines if line.extras}
    named = {name: {light.normal(one) for one in rest} for name, *rest in held if name in ("all", "test")}
    assert named["test"] >= {"all"}
    assert mine - {"hf", "clip"} <= named["all"], "hf and clip are parts of seed-x"
