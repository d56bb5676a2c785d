"""``--dry-run`` loads and trains with the same options as a run, and fails with the same errors."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training.toy import change, copy_suite

from cnext import backbones
from cnext.backbones.tiny.model import WEIGHTS, TinyBackbone
from cnext.cli import run_main
from cnext.errors import UserError
from cnext.tasks import generated, synthetic
from cnext.training import trainer
from cnext.training.trainer import TaskTrainer


@pytest.fixture
def flags(toy_suite: Path, data: Path, tmp_path: Path) -> list[str]:
    paths = {"--suite": toy_suite, "--data": data, "--order": "VQAv2,HQEdit", "--out": tmp_path / "runs"}
    return [*(str(part) for pair in paths.items() for part in pair), "--device", "cpu"]


class Staged(TinyBackbone):
    """The tiny backbone with a loading option."""

    @classmethod
    def load(cls, *given: Any, stage: str = "first", **more: Any) -> Any:
        return super().load(*given, **more)


CHOICES = {
    "none": [],
    "weights": ["--weights", str(WEIGHTS)],
    "precision": ["--precision", "bfloat16"],
    "checkpointing": ["--checkpointing", "True"],
    "device map": ["--device-map", "balanced"],
    "backbone options": ["--backbone-options", "stage=second"],
    "trainable": ["--trainable", "connections"],
    "micro-batch": ["--micro-batch-size", "2", "--batch-size", "4"],
    "schedule": ["--schedule", "released", "--learning-rate", "0.5"],
    "workers": ["--workers", "1"],
    "prompts": ["--prompts", "consistent"],
    "method": ["--method", "replay", "--replay.samples", "3"],
}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES.keys())
def test_options_reach_the_dry_run_as_they_reach_a_run(
    chosen: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded in the loading of the backbone and in the trainer."""
    seen: list[list[Any]] = []
    load, made = Staged.load.__func__, TaskTrainer.__init__

    @functools.wraps(load)
    def loaded(cls: type, *given: Any, **more: Any) -> Any:
        seen[-1] += [given, more]
        return load(cls, *given, **(more | {"device_map": None}))

    def make(self: TaskTrainer, backbone: Any, method: Any, parameters: dict, samples: Any, *given: Any) -> None:
        recipe, _steps, _seed, extras, workers, _encoded = given
        seen[-1] += [type(method), sorted(parameters), samples[0], recipe, sorted(extras), workers]
        seen[-1].append(next(backbone.decoder.parameters()).dtype)
        made(self, backbone, method, parameters, samples, *given)
        raise UserError("seen enough")

    monkeypatch.setattr(backbones, "load", lambda name: Staged)
    monkeypatch.setattr(Staged, "load", classmethod(loaded))
    monkeypatch.setattr(TaskTrainer, "__init__", make)
    monkeypatch.setattr("cnext.training.runner.Runner.evaluate_stage", lambda *_: None)
    for more in ([], ["--dry-run"]):
        seen.append([])
        assert run_main([*flags, *chosen, *more]) == 2
    assert len(seen[0]) == 9
    assert seen[0] == seen[1]


ERRORS = {
    "weights": ["--weights", "nowhere"],
    "device map": ["--device-map", "balanced"],
    "clip": ["--clip", "nowhere.pt"],
    "no data": ["--data", "nowhere"],
    "a file as data": ["--data", "file"],
    "data of something else": ["--data", "empty"],
    "its last row": ["--data", "broken"],
    "a folder of another run": ["--out", "taken"],
    "a file as output": ["--out", "file"],
    "launcher option": ["--launcher", "slurm", "--launcher-option", "x"],
}


@pytest.mark.parametrize("wrong", ERRORS.values(), ids=ERRORS.keys())
def test_errors_of_a_run_are_errors_of_the_dry_run(
    wrong: list[str],
    flags: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    Path("empty").mkdir()
    shutil.copytree(data, "broken")
    rows = json.loads(Path("broken/HQEdit/questions/test.json").read_text())
    del rows[-1]["instruction"]
    Path("broken/HQEdit/questions/test.json").write_text(json.dumps(rows))
    Path("taken/mage/VQAv2-HQEdit/seed-0").mkdir(parents=True)
    Path("taken/mage/VQAv2-HQEdit/seed-0/precious").touch()
    said = []
    for more in (["--dry-run"], []):
        assert run_main([*flags, *wrong, *more]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if not line.startswith(("note:", "run f"))])
    assert said[0] == said[1]
    assert said[0][0].startswith("error: ")
    assert not any("Traceback" in line for line in said[0])


def test_a_synthetic_suite_is_made_by_its_own_generator(
    toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    class Other(generated.Generator):
        def write(self, folder: Path, train: int, test: int, seed: int = 1) -> Path:
            drawn.append((train, test))
            return super().write(folder, train, test, seed)

    other = SimpleNamespace(GENERATOR=Other(**vars(synthetic.GENERATOR)))
    monkeypatch.setitem(sys.modules, "other_suite", other)
    monkeypatch.setitem(generated.GENERATORS, "other", "other_suite")
    folder = shutil.copytree(toy_suite, tmp_path / "suite")
    change(folder / "suite.json", synthetic="other")
    assert run_main(["--suite", str(folder), "--order", "VQAv2", "--dry-run"]) == 0
    assert drawn == [(32, 8)], "no more than needed"


def test_several_processes_are_an_error(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main([*flags, "--dry-run"]) == 2
    assert "--dry-run times steps in one process; start it without torchrun" in capsys.readouterr().err


def test_batch_sizes_of_single_tasks(flags: list[str], toy_suite: Path, tmp_path: Path) -> None:
    folder = copy_suite(toy_suite, tmp_path / "suite", by_task={"HQEdit": {"batch_size": 3}})
    sizes = []
    begin = trainer.TaskTrainer.train_step

    def step(self: TaskTrainer) -> dict[str, Any]:
        sizes.append((len(self.batches.at(0, 4)), self.recipe.batch_size))
        return begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "train_step", step)
        assert run_main([*flags, "--suite", str(folder), "--dry-run"]) == 0
    assert sizes == [(16, 16)] * 4 + [(3, 3)] * 4


@pytest.mark.parametrize(
    ("reference", "status", "said"),
    [
        ("left", 2, "test.json#7: expected a reference box [x1,y1,x2,y2] with x1 < x2 and y1 < y2, got 'left'"),
        ("[31,29,15,15]", 0, "warning: RefCOCO: 1 of 8 references: "),
        ("[1e-05,0.62,0.98,0.95]", 0, ""),
    ],
)
def test_boxes_are_checked_before_a_run(
    reference: str, status: int, said: str, flags: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of two tasks the second's last box: refused, or warned of, before anything is trained."""
    folder = shutil.copytree(data, tmp_path / "boxes")
    path = folder / "RefCOCO/questions/test.json"
    rows = json.loads(path.read_text())
    rows[-1]["answer_bbox"] = reference
    path.write_text(json.dumps(rows))
    asked = [*flags, "--data", str(folder), "--order", "VQAv2,RefCOCO", "--method", "lora"]
    for more in (["--dry-run"], []):
        assert run_main([*asked, *more]) == status
        shown = capsys.readouterr()
        lines = [line for line in (shown.out + shown.err).splitlines() if "RefCOCO/questions/test.json#7" in line]
        assert len(lines) == bool(said)
        assert all(said in line for line in lines)
    (log,) = tmp_path.glob("runs/lora/*/seed-0/run.log")
    assert ("warning: RefCOCO" in log.read_text()) == (reference == "[31,29,15,15]")
