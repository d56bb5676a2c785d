"""The command that a report gives runs the same again: parsed, it resolves to the configuration that it was made of."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from cnext import methods
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import run_main
from cnext.config.plan import Plan, plan
from cnext.config.run_config import Options, RunConfig
from cnext.runs.command_line import FILE, YAML, command, read, write, write_yaml
from cnext.studies.flags import configs, parse


def planned(arguments: list[str]) -> list[Plan]:
    return [plan(config) for config in configs(parse(arguments))]


def again(config: dict[str, Any], options: dict[str, Any]) -> tuple[str, Plan]:
    told = command(config, options)
    words = shlex.split(told)
    assert words[0] == "cnext-run"
    [found] = planned(words[1:])
    return told, found


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone takes options of its own."""

    def load(*given: Any, edit: str = "first", steps: int = 3, fast: bool = False, share: float = 0.5) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr(TinyBackbone, "load", load)


RELEASED = ["--suite", "continual-next", "--data", "some/folder", "--preset"]
GIVEN: dict[str, list[str]] = {
    "nothing": [],
    "backbone": ["--backbone", "janus", "--weights", "some/folder"],
    "suite": ["--suite", "coin", "--data", "some/folder of data"],
    "suite as a folder": ["--suite", "{toy}", "--data", "{toy}"],
    "released": [*RELEASED, "released"],
    "by task": [*RELEASED, "paper"],
    "by task, changed": [*RELEASED, "paper", "--batch-size", "8"],
    "preset": ["--preset", "smoke"],
    "split": ["--split", "validation"],
    "out": ["--out", "an other/folder"],
    "data": ["--data", "it's/here"],
    "on_bad_row": ["--on-bad-row", "skip"],
    "device": ["--device", "cpu"],
    "threads": ["--threads", "2"],
    "checkpoint_interval": ["--checkpoint-interval", "7"],
    "clip": ["--clip", "openai/ViT-B-16"],
    "prompts": ["--suite", "continual-next", "--data", "some/folder", "--prompts", "consistent"],
    "prompts as they are": ["--prompts", "released"],
    "learning_rate": ["--learning-rate", "1e-5"],
    "batch_size": ["--batch-size", "4"],
    "micro_batch_size": ["--micro-batch-size", "0"],
    "schedule": ["--schedule", "released"],
    "trainable": ["--trainable", "connections"],
    "precision": ["--precision", "bfloat16"],
    "checkpointing": ["--checkpointing", "True"],
    "no checkpointing": ["--checkpointing", "False"],
    "draws": ["--draws", "epoch"],
    "draws, released": [*RELEASED, "released", "--draws", "sample"],
    "weights": ["--weights", "some/folder"],
    "backbone_options": ["--backbone-options", "edit=second", "steps=4", "fast=true", "share=0.25"],
    "device_map": ["--device-map", "balanced"],
    "workers": ["--workers", "3"],
    "log": ["--log", "tensorboard"],
    "logs": ["--log", "wandb", "tensorboard"],
    "init_from": ["--init-from", "{toy}/suite.json"],
    "init_tasks": ["--init-from", "{toy}/suite.json", "--init-tasks", "VQAv2", "ImageNet"],
    "order": ["--order", "VQAv2,HQEdit", "--seeds", "3"],
    "drawn order": ["--order", "random:7"],
    "numbers": ["--method", "mage", "--mage.c", "2", "--mage.rank", "4", "--mage.scale", "-1e-3"],
    "words": ["--method", "mage", "--mage.average", "pema-literal"],
    "a truth": ["--method", "mr-lora", "--mr-lora.oracle", "--mr-lora.router-steps", "9"],
    "a hyphen": ["--method", "ew-ga", "--ew-ga.dropout", "0.5"],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_the_command_resolves_to_the_same_plan(given: list[str], toy_suite: Path, tmp_path: Path) -> None:
    """With the options that were kept, and of a folder from before they were kept."""
    [first] = planned([word.format(toy=toy_suite) for word in given])
    config, options = first.as_dict(), json.loads(json.dumps(dataclasses.asdict(first.config), default=str))
    _, second = again(config, options)
    assert second.as_dict() == config
    # What decides no numbers comes again as well.
    known = {"device": first.device, "hyperparameters": first.hyperparameters}
    assert dataclasses.replace(second.config, **known) == dataclasses.replace(first.config, **known)
    # So do the settings that the run wrote.
    file = write_yaml([first], tmp_path / YAML)
    third = plan(RunConfig.from_yaml(file))
    assert third.as_dict() == config
    assert dataclasses.replace(third.config, **known) == dataclasses.replace(first.config, **known)
    assert configs(parse(["--config", str(file)])) == [RunConfig.from_yaml(file)]
    if str(toy_suite) in first.config.suite:
        assert f"--suite path/to/{first.suite.name} " in command(config, {}), "its path is not known"
    else:
        assert again(config, {})[1].as_dict() == config


@pytest.mark.parametrize("name", sorted(methods.modules()))
def test_every_methods_hyperparameters_come_again(name: str, tmp_path: Path) -> None:
    fields = [field for field in dataclasses.fields(methods.declared(name)) if field.type is not str]
    changed = {field.name: True if field.type is bool else field.type(field.default + 1) for field in fields}
    for values in ({}, {label: value for label, value in changed.items() if label in ("rank", "scale", "oracle")}):
        first = plan(RunConfig(method=name, hyperparameters=values))
        assert again(first.as_dict(), {})[1].as_dict() == first.as_dict()
        file = write_yaml([first], tmp_path / YAML)
        assert plan(RunConfig.from_yaml(file)).as_dict() == first.as_dict()
        assert configs(parse(["--config", str(file)])) == [RunConfig.from_yaml(file)]


def test_no_option_is_left_out() -> None:
    """An option that is new needs a case above; the command has it without being told."""
    assert {field.name for field in dataclasses.fields(Options)} <= set(GIVEN)


def test_defaults_without_influence_on_results_are_left_out() -> None:
    [first] = planned([])
    told = command(first.as_dict(), json.loads(json.dumps(dataclasses.asdict(first.config), default=str)))
    for flag in ("--workers", "--log", "--out", "--clip", "--weights", "--backbone-options", "--learning-rate"):
        assert flag not in told
    for part in (
        "--backbone tiny",
        "--suite next-tiny",
        "--preset default",
        "--order paper",
        "--seeds 0",
        "--mage.c 5.0",
    ):
        assert part in told


def test_a_run_from_before_draws_could_be_made_anew_is_repeated_as_it_was() -> None:
    """The preset made none anew then; config.json says nothing of it, as that of today where there are none."""
    config = plan(RunConfig(suite="continual-next", data=Path("data"), preset="released")).as_dict()
    assert config["recipe"].pop("draws") == "epoch"
    told, found = again(config, {})
    assert " --draws sample" in told
    assert found.as_dict() == config
    assert "draws" not in plan(RunConfig()).as_dict()["recipe"]


def test_flags_of_a_method_that_is_not_here() -> None:
    config = {"method": "gone", "hyperparameters": {"rank": 8, "freeze": False, "x": None, "sizes": [1, 2]}}
    assert command(config, {}).endswith("--gone.rank 8 --gone.no-freeze --gone.sizes 1 2")


def test_a_run_keeps_its_options_and_resumes_with_others(
    toy_suite: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "zero-shot", "--order", "VQAv2", "--suite", str(toy_suite), "--data", str(data)]
    assert run_main(flags) == 0
    folder = Path("runs/zero-shot/VQAv2/seed-0")
    assert read(folder / FILE).suite == str(toy_suite)
    assert RunConfig.from_yaml(folder / YAML).folder == folder
    assert f"--suite {shlex.quote(str(toy_suite))} " in (folder / "report.md").read_text()
    before = (folder / "results.json").read_bytes(), (folder / "config.json").read_bytes()
    # As left by an earlier release; and with other options that decide no numbers.
    (folder / FILE).unlink()
    assert run_main([*flags, "--workers", "1"]) == 0
    assert read(folder / FILE).workers == 1
    assert " --workers 1" in (folder / "report.md").read_text()
    # A folder that was moved goes on where it is.
    Path("runs").rename("moved")
    assert run_main(["--config", f"moved/{folder.relative_to('runs')}/{YAML}", "--out", "moved"]) == 0
    moved = Path("moved/zero-shot/VQAv2/seed-0")
    assert ((moved / "results.json").read_bytes(), (moved / "config.json").read_bytes()) == before


def test_options_come_back_as_they_were(tmp_path: Path) -> None:
    config = RunConfig(out=tmp_path, weights=Path("w"), backbone_options=("a=b",), order="a b", checkpointing=False)
    config = dataclasses.replace(config, hyperparameters={"c": 2.0}, data=tmp_path / "data", threads=2)
    config.folder.mkdir(parents=True)
    assert read(write(config)) == config


def test_files_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    """Their fields have other names: in options.json the preset as well, in config.json it still is the budget."""
    config = RunConfig(out=tmp_path, checkpoint_interval=7, preset="smoke")
    config.folder.mkdir(parents=True)
    path = write(config)
    earlier = path.read_text().replace("checkpoint_interval", "block_steps").replace("preset", "budget")
    path.write_text(json.dumps(json.loads(earlier) | {"log": "tensorboard"}))
    assert read(path) == dataclasses.replace(config, log=("tensorboard",))
    assert " --log tensorboard" in command({}, json.loads(path.read_text()))
    path.write_text(json.dumps(json.loads(earlier) | {"log": "jsonl"}))
    assert read(path) == config
    assert "--log" not in command({}, json.loads(path.read_text()))
    values = plan(config).as_dict()
    values["block_steps"] = values.pop("checkpoint_interval")
    assert " --checkpoint-interval 7 " in command(values, json.loads(earlier))
