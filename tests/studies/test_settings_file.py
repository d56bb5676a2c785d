"""Settings in a YAML file: each value by its declared type, flags above it, and every error with its line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnext import RunConfig
from cnext.config.plan import plan
from cnext.config.settings_file import read, text
from cnext.errors import UserError
from cnext.runs.command_line import write_yaml
from cnext.studies import flags


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def one(file: Path, line: str) -> Any:
    """What one line means, or the text of its problem without the file's name."""
    file.write_text(f"# a comment\n{line}\n")
    found = read(file, flags.kinds())
    if found.problems:
        [problem] = found.problems
        return str(problem).removeprefix(f"{file}:")
    return found.hyperparameters or found.values


READ = {
    "learning_rate: 1e-3": {"learning_rate": 0.001},
    "learning_rate: 1": {"learning_rate": 1.0},
    "learning_rate: .5": {"learning_rate": 0.5},
    "learning_rate: null": {"learning_rate": None},
    "learning_rate:": {"learning_rate": None},
    "preset: on": {"preset": "on"},
    "preset: 010": {"preset": "010"},
    "order: no": {"order": ["no"]},
    "order: 12:30": {"order": ["12:30"]},
    "order: [paper, 'a,b', random:7]": {"order": ["paper", "a,b", "random:7"]},
    "order: ~": {"order": None},
    "jobs: 2": {"jobs": "2"},
    "seeds: 3": {"seeds": [3]},
    "seeds: [0, -1]": {"seeds": [0, -1]},
    "checkpointing: false": {"checkpointing": False},
    "mix_environments: True": {"mix_environments": True},
    "data: 'my data'": {"data": Path("my data")},
    "log: wandb": {"log": ("wandb",)},
    "log: [tensorboard, wandb]": {"log": ("tensorboard", "wandb")},
    "backbone_options: [edit_stage=second]": {"backbone_options": ("edit_stage=second",)},
    "mage: {pull: 2e-2, average: none, rank: 4, independent: true}": {
        "mage": {"pull": 0.02, "average": "none", "rank": 4, "independent": True}
    },
    "mr-lora:\n  oracle: true": {"mr-lora": {"oracle": True}},
    "mage: {c: .inf}": {"mage": {"c": math.inf}},
    "mage: {c: -.inf}": {"mage": {"c": -math.inf}},
    "{}": {},
    "": {},
}


@pytest.mark.parametrize(("line", "values"), READ.items(), ids=READ)
def test_a_value_is_of_the_type_of_its_name(line: str, values: dict[str, Any], file: Path) -> None:
    assert one(file, line) == values


REFUSED = {
    "learnig_rate: 1": "2: unknown name learnig_rate; perhaps you meant learning_rate",
    "batch-size: 1": "2: unknown name batch-size; perhaps you meant batch_size",
    "seed: 1": "2: unknown name seed; perhaps you meant seeds",
    "dry_run: true": "2: unknown name dry_run; valid: backbone, suite, ",
    "mages: {c: 1}": "2: unknown method mages; perhaps you meant mage",
    "mage.pull: 1": "2: expected a hyperparameter below its method, got mage.pull; write mage: {pull: ...}",
    "mage:\n  rank: 8\n  pul: 1": "4: unknown hyperparameter mage.pul; perhaps you meant mage.pull",
    "zero-shot: {x: 1}": "2: unknown hyperparameter zero-shot.x, which has none",
    "mage: 3": "2: mage: expected names and values, as in `name: value`, got '3'",
    "mage: {pull: '0.1'}": "2: mage.pull: expected a number, got the text '0.1' in quotes",
    "mage: {rank: 1.5}": "2: mage.rank: expected a whole number, got '1.5'",
    "mage: {rank: 010}": "2: mage.rank: expected a whole number, got '010'",
    "mage: {rank: 1_000}": "2: mage.rank: expected a whole number, got '1_000'",
    "mage: {pull: nan}": "2: mage.pull: expected a number, got 'nan'",
    "mage: {independent: yes}": "2: mage.independent: expected true or false, got 'yes'",
    "mage: {independent: 1}": "2: mage.independent: expected true or false, got '1'",
    "checkpointing: on": "2: checkpointing: expected true or false, got 'on'",
    "preset:": "2: preset: expected a text, got nothing",
    "preset: [smoke]": "2: preset: expected a text, got a list",
    "preset: {a: 1}": "2: preset: expected a text, got names and values",
    "seeds: [0, [1]]": "2: seeds: expected a whole number, got a list",
    "seeds: [0, null]": "2: seeds: expected a whole number, got nothing",
    "split: train": "2: split: expected one of test, validation, reworded, got 'train'",
    "seeds: 1\npreset: smoke\nseeds: 2": "4: seeds is there twice, first in line 2; remove one",
    "mage: {c: 1, c: 2}": "2: mage.c is there twice, first in line 2; remove one",
    "[a, b]": "2: expected names and values, as in `name: value`, got a list",
    "? [a]\n: 1": "2: expected a name before the colon, got a list",
    "<<: {seeds: 1}": "2: unknown method <<; valid: ",
    "preset: !!python/name:os.system smoke": "2: preset: YAML's tags are not read, got !!python/name:os.system; write",
    "preset: !mine smoke": "2: preset: YAML's tags are not read, got !mine; write the plain value",
}


@pytest.mark.parametrize(("line", "problem"), REFUSED.items(), ids=REFUSED)
def test_what_is_wrong_is_said_with_its_line(line: str, problem: str, file: Path) -> None:
    assert one(file, line).startswith(problem)


NO_YAML = {
    b"a: [1\n": ":2: not YAML: ",
    b"a: b: c\n": ":1: not YAML: mapping values are not allowed here",
    b"a: 1\n---\nb: 2\n": ":2: not YAML: but found another document",
    b"\xff\xfe\x00a": ": expected YAML in UTF-8: ",
    b"a: \x00": ":1: not YAML: ",
    b"[" * 1500: ": it is nested too deeply",
    b"#" * 1_000_001: ": expected a small YAML file of settings, it has 1,000,001 bytes",
}


@pytest.mark.parametrize(("content", "message"), NO_YAML.items(), ids=range(len(NO_YAML)))
def test_what_is_not_yaml_is_one_line(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(file, flags.kinds())
    assert str(error.value).startswith(f"{file}{message}")
    assert "\n" not in str(error.value)


def test_flags_win_over_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(
        "method: [mage, lora]\nseeds: [0, 1]\nsuite: continual-next\ndata: here\npreset: released\nthreads: 2\n"
        "mage: {pull: 0.5, c: 3}\nlora: {rank: 2}\n"
    )
    found = flags.configs(flags.parse(["--config", str(file)]))
    assert [(c.method, c.seed) for c in found] == [("mage", 0), ("mage", 1), ("lora", 0), ("lora", 1)]
    assert {(c.suite, c.preset, c.data, c.threads) for c in found} == {("continual-next", "released", Path("here"), 2)}
    assert found[0].hyperparameters == {"pull": 0.5, "c": 3.0}
    assert found[2].hyperparameters == {"rank": 2}
    words = ["--seeds", "7", "--config", str(file), "--threads=4", "--mage.c", "4", "--preset", "paper"]
    found = flags.configs(flags.parse(words))
    assert [(c.method, c.seed, c.threads, c.preset) for c in found] == [
        ("mage", 7, 4, "paper"),
        ("lora", 7, 4, "paper"),
    ]
    assert found[0].hyperparameters == {"pull": 0.5, "c": 4.0}
    assert not capsys.readouterr().err
    [found] = flags.configs(flags.parse(["--config", str(file), "--method", "lora", "--seeds", "0"]))
    assert (found.method, found.hyperparameters) == ("lora", {"rank": 2})
    assert capsys.readouterr().err == (
        f"note: {file}: hyperparameters of mage, which is not among the methods of --method\n"
    )


def test_a_preset_of_the_file_gives_its_defaults(file: Path) -> None:
    """A value that is the method's default, but not the preset's, is given; and the other way round."""
    words = ["--method", "mage-paper", "--suite", "continual-next", "--preset", "released", "--data", "x"]
    given = flags.configs(flags.parse(words))
    expected = plan(given[0]).hyperparameters
    file.write_text("method: mage-paper\nsuite: continual-next\npreset: released\ndata: x\n")
    [config] = flags.configs(flags.parse(["--config", str(file)]))
    own = plan(RunConfig(method="mage-paper")).hyperparameters
    assert plan(config).hyperparameters == expected != own
    file.write_text(file.read_text() + f"mage-paper: {{scale: {own['scale']}, dropout: {expected['dropout']}}}\n")
    [config] = flags.configs(flags.parse(["--config", str(file)]))
    assert config == RunConfig.from_yaml(file)
    assert plan(config).hyperparameters == expected | {"scale": own["scale"]}


def test_hyperparameters_of_another_method_are_refused(file: Path) -> None:
    file.write_text("method: lora\nmage: {c: 1}\n")
    for reader in (lambda: flags.parse(["--config", str(file)]), lambda: RunConfig.from_yaml(file)):
        with pytest.raises(UserError, match="hyperparameters of mage, "):
            reader()


@pytest.mark.parametrize("line", ["seeds: [0, 1]", "method: [mage, lora]", "order: [paper, reverse]", "seeds: []"])
def test_a_run_config_is_one_run(line: str, file: Path) -> None:
    file.write_text(f"{line}\n")
    with pytest.raises(UserError, match=rf"run.yaml: {line.partition(':')[0]}: expected one, for a RunConfig is one"):
        RunConfig.from_yaml(file)


def test_a_studys_file_repeats_the_study(file: Path) -> None:
    words = ["--method", "mage", "lora", "--order", "paper", "VQAv2,HQEdit", "--seeds", "0", "2", "--mage.c", "2.5"]
    plans = [plan(config) for config in flags.configs(flags.parse(words))]
    write_yaml(plans, file, jobs="2", device="auto")
    again = flags.parse(["--config", str(file)])
    assert [plan(config).as_dict() for config in flags.configs(again)] == [planned.as_dict() for planned in plans]
    assert (again.jobs, again.device) == ("2", "auto")
    assert yaml.safe_load(file.read_text())["seeds"] == [0, 2], "plain YAML, for other programs as well"


HARD = [
    "on",
    "~",
    "",
    "1e-3",
    "a, b",
    "a: b",
    "# no",
    "it's",
    '"x"',
    "two\nlines",
    "\t",
    "ünï",
    "null",
    "[x]",
    " x ",
    "-",
]


@pytest.mark.parametrize("value", HARD)
def test_any_text_comes_again(value: str, file: Path) -> None:
    values = {"clip": value, "order": [value, "b"], "data": Path("a") / value, "log": ("wandb", "jsonl")}
    own = {"average": value, "pull": 1e-05, "c": math.inf, "independent": False, "rank": 3}
    file.write_text(text(values, {"mage": own, "lora": {}}, "One.\nTwo."))
    assert file.read_text().startswith("# One.\n# Two.\nclip: ")
    found = read(file, flags.kinds())
    assert not found.problems
    assert found.values == values
    assert found.hyperparameters == {"mage": own}
