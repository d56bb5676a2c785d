"""The doctor names what is in the way of a run, and what to do about it; what is in no one's way is not counted."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from backbones.seed_x.released import write_released
from tasks.official import write_continual_next

from cnext import packages
from cnext.cli import main, run_main
from cnext.doctor import checks
from cnext.doctor.checks import Wanted
from cnext.errors import UserError
from cnext.ops import dispatch
from cnext.packages import BAD, EVERY_RUN, NOTE, OK, SOME_RUNS, Finding
from cnext.scoring.clip import TINY_CLIP
from cnext.studies import resources
from cnext.tasks import suites


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package imports."""
    monkeypatch.setattr(packages, "broken", lambda places: [""] * len(places))


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_each_package_that_does_not_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "first": "",
        "raises": "raise RuntimeError('operator torchvision::nms does not exist')",
        "second": "value = 1",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "exits": "import sys; sys.exit('a bad day')",
        "waits": "import time; time.sleep(100)",
        "third": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "PATIENCE", 2.0)
    places = ["first", "raises", "second:value", "second:nothing", "dies", "exits", "waits", "third", "not_there"]
    assert packages.broken(places) == [
        "",
        "RuntimeError: operator torchvision::nms does not exist",
        "",
        "AttributeError: module 'second' has no attribute 'nothing'",
        "its import ends Python by signal 11",
        "a bad day",
        "importing takes more than 2 s",
        "",
        "ModuleNotFoundError: No module named 'not_there'",
    ]


def test_a_torchvision_of_another_torch_is_the_one_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"torchvision": "operator torchvision::nms does not exist", "open_clip": "the same", "peft:PeftModel": "so"}
    monkeypatch.setattr(packages, "broken", lambda places: [wrong.get(place, "") for place in places])
    found = {finding.name: finding for finding in packages.packages()}
    assert [name for name, finding in found.items() if finding.state == BAD] == ["torchvision", "open_clip_torch"]
    assert found["torchvision"].text.endswith("broken: operator torchvision::nms does not exist")
    assert "install --force-reinstall torchvision torch==" in found["torchvision"].cure
    assert found["open_clip_torch"].cure == found["peft"].cure == "mend torchvision first, which it imports"
    assert found["peft"].state == NOTE


def test_a_run_with_a_broken_torchvision_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a CPU build of torch finds the torchvision of a CUDA build."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    real = packages.version
    told = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(packages, "version", lambda name: told.get(name) or real(name))
    assert run_main(["--method", "lora", "--budget", "smoke", "--out", str(tmp_path / "runs")]) == 2
    why, cure, more = capsys.readouterr().err.splitlines()[-3:]
    assert why == "error: torchvision 0.28.0 cannot be imported: operator torchvision::nms does not exist"
    assert "pip install --force-reinstall torchvision torch==2.13.0+cpu --index-url INDEX, with the index that" in cure
    assert more == "`cnext doctor` tries every package"
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.usefixtures("whole")
def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.version
    told = {"torch": "2.1.0+cu118", "tyro": None, "ray": None, "diffusers": "0.1.0"}
    monkeypatch.setattr(packages, "version", lambda name: told[name] if name in told else real(name))
    found = {finding.name: finding for finding in packages.packages()}
    assert list(found) == [*EVERY_RUN, *SOME_RUNS]
    assert (found["torch"].state, found["torch"].text.partition(" than")[0]) == (BAD, "2.1.0+cu118, older")
    assert found["torch"].cure.startswith("pip install --upgrade 'torch>=2.")
    assert (found["tyro"].state, found["tyro"].cure) == (BAD, "pip install 'tyro'")
    assert (found["ray"].state, found["ray"].cure) == (NOTE, "pip install 'cnext[ray]'")
    assert found["diffusers"].state == NOTE
    assert states(packages.packages(["diffusers"]))["diffusers"] == BAD


def test_a_broken_package_is_in_the_way_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For once imported for real: a torchvision for another torch, which breaks transformers."""
    monkeypatch.setattr(packages, "EVERY_RUN", {name: EVERY_RUN[name] for name in ("torchvision", "transformers")})
    monkeypatch.setattr(packages, "SOME_RUNS", {})
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken: RuntimeError: operator torchvision::nms does not exist" in shown
    last = shown.splitlines()[-1]
    assert last == "in the way of a run: packages: torchvision, packages: transformers"
    assert "mend torchvision first, which it imports" in shown


@pytest.mark.usefixtures("whole")
def test_the_embedded_run_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("ready: nothing is in the way of a run\n")
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] is True
    assert told["versions"]["torch"]
    by_section: dict[str, set[str]] = {}
    for finding in told["findings"]:
        by_section.setdefault(finding["section"], set()).add(finding["state"])
    assert list(by_section) == ["packages", "devices", "kernels", "backbones", "data", "scorers", "room"]
    assert BAD not in set().union(*by_section.values())


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("backbone", ["seed-x", "janus", "emu3"])
def test_weights_that_are_not_there(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--weights", str(tmp_path)]):
        assert main(["doctor", "--backbone", backbone, *given]) == 1
        shown = capsys.readouterr().out
        assert shown.splitlines()[-1] == f"in the way of a run: backbones: {backbone}"
        assert (str(tmp_path) if given else "--weights") in shown


@pytest.mark.usefixtures("whole")
def test_what_a_backbone_draws_with_is_looked_for_where_the_suite_draws(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "pretrained", drawing=False)
    for drawn, expected in ((False, {"seed-x": OK}), (True, {"seed-x": OK, "seed-x drawing": BAD})):
        found = checks.backbones(Wanted("seed-x", weights=weights), drawn)
        assert {finding.name: finding.state for finding in found if "seed-x" in finding.name} == expected
    assert f"expected in {weights}, and not there: seed_detokenizer/first_stage" in found[-2].text
    shown = states(checks.examine(Wanted("seed-x", "continual-next", weights)))
    assert shown["seed-x drawing"] == BAD


@pytest.mark.usefixtures("whole")
def test_a_name_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--backbone", "huge"]) == 2
    assert "unknown backbone 'huge'; valid: emu3, janus, seed-x, tiny" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown suite 'coins'"):
        checks.examine(Wanted(suite="coins"))


def test_data(tmp_path: Path) -> None:
    suite = suites.load("continual-next")
    (needs,) = checks.data(suite, None)
    assert (needs.state, needs.cure.partition(";")[0]) == (BAD, "--data FOLDER")
    folder = write_continual_next(tmp_path / "data")
    assert set(states(checks.data(suite, folder)).values()) == {OK}
    (folder / "SEED-Data-VQAv2/questions/test.json").unlink()
    shutil.rmtree(folder / "SEED-Data-HQEdit/images")
    found = {finding.name.split()[1]: finding for finding in checks.data(suite, folder)}
    assert [name for name, finding in found.items() if finding.state == BAD] == ["VQAv2", "HQEdit"]
    assert "no file matches" in found["VQAv2"].text
    assert found["HQEdit"].text == f"no image folder {folder}/SEED-Data-HQEdit/images"


def test_the_clip_is_loaded_where_it_is_a_file_and_never_downloaded(tmp_path: Path) -> None:
    suite = suites.load("continual-next")
    (note,) = checks.scorers(suite, None)
    assert (note.state, note.text.split()[0]) == (NOTE, "openai/ViT-B-32")
    (tmp_path / "ViT-B-32.pt").write_text("not a model")
    for clip, state in ((TINY_CLIP, OK), (tmp_path / "ViT-B-32.pt", BAD), (tmp_path / "none.pt", BAD)):
        (found,) = checks.scorers(suite, str(clip))
        assert (found.state, str(clip) in found.text) == (state, True)


def test_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(out=tmp_path / "not" / "there")
    assert set(states(checks.room(wanted)).values()) == {OK}
    monkeypatch.setattr(resources, "memory", lambda: 5e8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    found = {finding.name: finding for finding in checks.room(wanted)}
    assert (found["memory"].state, found["runs"].state) == (BAD, BAD)
    assert found["memory"].text == "0.5 GB free; a run has taken 1.1 GB"
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"{tmp_path} cannot be written to" in checks.room(wanted)[1].text


def test_kernels_that_were_not_built_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = [finding for finding in checks.kernels() if finding.name == "cpu"]
    assert (found.state, found.text) == (OK, "cpp for averaging and the branches' dropout; torch for the rest")
    monkeypatch.setattr(dispatch, "missing", lambda impl, _: f"no {impl} here")
    found = {finding.name: finding for finding in checks.kernels()}
    text = "plain torch, many times slower in averaging and dropout; no cpp: no cpp here"
    assert (found["cpu"].state, found["cpu"].text) == (NOTE, text)
