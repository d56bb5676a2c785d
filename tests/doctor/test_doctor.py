"""``cnext doctor`` reports what prevents a run and how to fix it; notes do not fail it."""

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
from cnext.cli import main
from cnext.config.run_config import Options
from cnext.doctor import checks
from cnext.errors import UserError
from cnext.ops import dispatch
from cnext.packages import ERROR, EVERY_RUN, NOTE, OK, SOME_RUNS, Check
from cnext.scoring.clip import TINY_CLIP
from cnext.studies import resources
from cnext.tasks import suites


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package imports."""
    monkeypatch.setattr(packages, "import_errors", lambda modules: [""] * len(modules))


def states(found: list[Check]) -> dict[str, str]:
    return {check.name: check.state for check in found}


def test_packages_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(packages, "IMPORT_TIMEOUT", 2.0)
    places = ["first", "raises", "second:value", "second:nothing", "dies", "exits", "waits", "third", "not_there"]
    assert packages.import_errors(places) == [
        "",
        "RuntimeError: operator torchvision::nms does not exist",
        "",
        "AttributeError: module 'second' has no attribute 'nothing'",
        "importing it ends Python by signal 11",
        "a bad day",
        "no end of its import in 2 s",
        "",
        "ModuleNotFoundError: No module named 'not_there'",
    ]


def test_a_torchvision_of_another_torch_is_the_one_to_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"torchvision": "operator torchvision::nms does not exist", "open_clip": "the same", "peft:PeftModel": "so"}
    monkeypatch.setattr(packages, "import_errors", lambda modules: [wrong.get(module, "") for module in modules])
    assert ERROR not in states(packages.check_packages(packages.needed("tiny"))).values()
    found = {check.name: check for check in packages.check_packages(packages.needed("janus"))}
    assert [name for name, check in found.items() if check.state == ERROR] == ["torchvision"]
    assert found["torchvision"].text.endswith("broken: operator torchvision::nms does not exist")
    assert "install --force-reinstall torchvision torch==" in found["torchvision"].fix
    assert found["open_clip_torch"].fix == found["peft"].fix == "fix torchvision first, which it imports"
    assert found["peft"].state == NOTE


def test_a_broken_torchvision_fails_a_model_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU build of torch finds the torchvision of a CUDA build."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    real = packages.version
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(packages, "version", lambda name: versions.get(name) or real(name))
    with pytest.raises(UserError) as refused:
        packages.require(*packages.needed("janus"))
    why, fix, more = str(refused.value).splitlines()
    assert why == "torchvision 0.28.0 cannot be imported: operator torchvision::nms does not exist"
    assert "pip install --force-reinstall torchvision torch==2.13.0+cpu --index-url INDEX, with the index that" in fix
    assert more == "`cnext doctor` checks every package"


@pytest.mark.usefixtures("importable")
def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.version
    versions = {"torch": "2.1.0+cu118", "tyro": None, "ray": None, "diffusers": "0.1.0"}
    monkeypatch.setattr(packages, "version", lambda name: versions[name] if name in versions else real(name))
    found = {check.name: check for check in packages.check_packages()}
    assert list(found) == [*EVERY_RUN, *SOME_RUNS]
    assert (found["torch"].state, found["torch"].text.partition(" than")[0]) == (ERROR, "2.1.0+cu118, older")
    assert found["torch"].fix.startswith("pip install --upgrade 'torch>=2.")
    assert (found["tyro"].state, found["tyro"].fix) == (ERROR, "pip install 'tyro'")
    assert (found["ray"].state, found["ray"].fix) == (NOTE, "pip install 'cnext[ray]'")
    assert found["diffusers"].state == NOTE
    assert states(packages.check_packages(["diffusers"]))["diffusers"] == ERROR


def test_a_broken_package_fails_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported in a real subprocess: a torchvision for another torch, which breaks transformers."""
    monkeypatch.setattr(packages, "EVERY_RUN", {name: SOME_RUNS[name][0] for name in packages.MODELS})
    monkeypatch.setattr(packages, "SOME_RUNS", {})
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "broken: RuntimeError: operator torchvision::nms does not exist" in shown
    last = shown.splitlines()[-1]
    assert last == "failed: packages: torchvision, packages: transformers"
    assert "fix torchvision first, which it imports" in shown


@pytest.mark.usefixtures("importable")
def test_the_default_run_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("ready: a run can start\n")
    assert main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ready"] is True
    assert shown["versions"]["torch"]
    sections = ["packages", "devices", "kernels", "backbones", "data", "scorers", "memory and disk"]
    assert list(dict.fromkeys(check["section"] for check in shown["checks"])) == sections
    assert {check["state"] for check in shown["checks"]} == {OK, NOTE}


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("backbone", ["seed-x", "janus", "emu3"])
def test_weights_that_are_not_there(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--weights", str(tmp_path)]):
        assert main(["doctor", "--backbone", backbone, *given]) == 1
        shown = capsys.readouterr().out
        assert shown.splitlines()[-1] == f"failed: backbones: {backbone}"
        assert (str(tmp_path) if given else "--weights") in shown


@pytest.mark.usefixtures("importable")
def test_weights_that_write_images_if_the_suite_needs_them(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "pretrained", drawing=False)
    for drawn, expected in ((False, {"seed-x": OK}), (True, {"seed-x": OK, "seed-x images": ERROR})):
        found = checks.backbones(Options("seed-x", weights=weights), drawn)
        assert {name: state for name, state in states(found).items() if "seed-x" in name} == expected
    texts = {check.name: check.text for check in found}
    assert f"expected in {weights}, and not there: seed_detokenizer/first_stage" in texts["seed-x images"]
    shown = states(checks.check_run(Options("seed-x", "continual-next", weights=weights)))
    assert shown["seed-x images"] == ERROR


def test_data(tmp_path: Path) -> None:
    suite = suites.load("continual-next")
    (needs,) = checks.data(suite, None)
    assert (needs.state, needs.fix.partition(";")[0]) == (ERROR, "--data FOLDER")
    folder = write_continual_next(tmp_path / "data")
    assert set(states(checks.data(suite, folder)).values()) == {OK}
    (folder / "SEED-Data-VQAv2/questions/test.json").unlink()
    shutil.rmtree(folder / "SEED-Data-HQEdit/images")
    found = {check.name.split()[1]: check for check in checks.data(suite, folder)}
    assert [name for name, check in found.items() if check.state == ERROR] == ["VQAv2", "HQEdit"]
    assert "no file matches" in found["VQAv2"].text
    assert found["HQEdit"].text == f"no image folder {folder}/SEED-Data-HQEdit/images"


def test_a_clip_file_is_loaded_and_nothing_is_downloaded(tmp_path: Path) -> None:
    suite = suites.load("continual-next")
    (note,) = checks.scorers(suite, None)
    assert (note.state, note.text.split()[0]) == (NOTE, "openai/ViT-B-32")
    (tmp_path / "ViT-B-32.pt").write_text("not a model")
    for clip, state in ((TINY_CLIP, OK), (tmp_path / "ViT-B-32.pt", ERROR), (tmp_path / "none.pt", ERROR)):
        (found,) = checks.scorers(suite, str(clip))
        assert (found.state, str(clip) in found.text) == (state, True)


def test_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Options("tiny", out=tmp_path / "not" / "there")
    assert set(states(checks.memory_and_disk(run)).values()) == {OK}
    monkeypatch.setattr(resources, "available_memory", lambda: 5e8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    found = {check.name: check for check in checks.memory_and_disk(run)}
    assert (found["memory"].state, found["runs"].state) == (ERROR, ERROR)
    assert found["memory"].text == "0.5 GB free; measured peak of a run: 1.1 GB"
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"{tmp_path} is not writable" in checks.memory_and_disk(run)[1].text


def test_why_kernels_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = [check for check in checks.kernels() if check.name == "cpu"]
    assert (found.state, found.text) == (OK, "cpp for averaging and the branches' dropout; torch for the rest")
    monkeypatch.setattr(dispatch, "missing", lambda impl, _: f"no {impl} here")
    found = {check.name: check for check in checks.kernels()}
    text = "plain torch, many times slower in averaging and dropout; no cpp: no cpp here"
    assert (found["cpu"].state, found["cpu"].text) == (NOTE, text)
