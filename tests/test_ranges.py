"""Numbers that are infinite or absurd, and devices that are none, wherever one is taken: refused in one line."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from cnext import RunConfig, methods
from cnext.cli import run_main
from cnext.config.plan import plan
from cnext.distributed import processes
from cnext.errors import UserError
from cnext.methods.base import check_hyperparameters
from cnext.tasks import suites

FLOATS = (math.inf, -math.inf, math.nan, 1e-300, 1e300, 10**400, 10**5000)
WHOLE = (-(10**9), 10**12, 10**5000)


def made(kind: type, given: dict[str, Any]) -> Any:
    check_hyperparameters(kind, given)
    return kind(**given)


@pytest.mark.parametrize("method", sorted(methods.modules()))
def test_every_hyperparameter_has_a_range(method: str) -> None:
    kind = methods.load(method)
    numbers = [field for field in fields(methods.declared(method)) if field.type in (int, float)]
    assert numbers or method == "zero-shot"
    for field in numbers:
        for value in WHOLE if field.type is int else FLOATS:
            with pytest.raises(UserError) as refused:
                made(kind, {field.name: value})
            assert field.name in str(refused.value)
            assert "\n" not in str(refused.value)
            assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", -1, "seed must be at least 0, got -1"),
        ("seed", 2**53, "seed must be at most 9007199254740991, got 9007199254740992"),
        ("seed", 10**5000, "seed must be at most 9007199254740991, got a number of more than 30 digits"),
        ("threads", 0, "threads must be at least 1, got 0"),
        ("threads", 10**6, "threads must be at most 1024, got 1000000"),
        ("checkpoint_interval", 10**12, "checkpoint_interval must be at most 1000000000"),
        ("workers", 10**6, "workers must be at most 256, got 1000000"),
        ("batch_size", 10**9, "batch_size must be at most 1048576"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("micro_batch_size", -1, "micro_batch_size must be at least 0"),
        ("learning_rate", math.inf, "learning_rate must be at most 100.0, got inf"),
        ("learning_rate", -math.inf, "learning_rate must be at least 1e-12, got -inf"),
        ("learning_rate", math.nan, "learning_rate must be at least 1e-12, got nan"),
        ("learning_rate", 1e-300, "learning_rate must be at least 1e-12, got 1e-300"),
        ("learning_rate", 0, "learning_rate must be at least 1e-12, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, float | str) else "",
)
def test_an_option_out_of_its_range(name: str, value: Any, said: str) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UserError) as refused:
        plan(RunConfig(**given))
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (["--mage.c", "inf"], "mage: {c: .inf}"),
        (["--mage.c", "1e-300"], "mage: {c: 1e-300}"),
        (["--mage.rank", "1000000000"], "mage: {rank: 1000000000}"),
        (["--learning-rate", "1e999"], "learning_rate: 1e999"),
        (["--seeds", "9" * 5000], f"seeds: {'9' * 5000}"),
    ],
    ids=["inf", "small", "rank", "learning rate", "digits"],
)
def test_so_it_is_by_flags_and_files(
    flags: list[str], lines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(lines + "\n")
    for words in (flags, ["--config", "run.yaml"]):
        assert run_main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", {"VQAv2": 10**12}),
        ("batch_size", 10**9),
        ("learning_rate", 1e300),
        ("learning_rate", math.nan),
        ("warmup_steps", 10**12),
        ("weight_decay", math.inf),
        ("weight_decay", 1e300),
        ("eps", 1e-300),
        ("max_grad_norm", 1e-300),
        ("micro_batch_size", 10**9),
        ("by_task", {"VQAv2": {"learning_rate": math.inf}}),
        ("by_task", {"VQAv2": {"batch_size": 10**9}}),
        ("hyperparameters", {"mage": {"c": math.inf}}),
    ],
)
def test_so_it_is_in_a_suite(name: str, value: Any, toy_suite: Path, tmp_path: Path) -> None:
    for file in toy_suite.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "suite.json").read_text())
    manifest["budgets"]["default"][name] = value
    (tmp_path / "suite.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refused:
        plan(RunConfig(suite=str(tmp_path)), forecast=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "device",
    ["mps", "xpu", "meta", "npu", "CPU", "cpu:0", "cuda:-1", "cuda:", "cuda:01", "cuda:1e3", "cuda:99999", "", " cpu"],
)
def test_other_devices_are_unknown(device: str) -> None:
    with pytest.raises(UserError, match=r"^unknown device '.*'; valid: auto, cpu, cuda, cuda:N$"):
        plan(RunConfig(device=device), elsewhere=True)


def test_several_processes_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^cuda:1 is one GPU, and 2 processes"), processes.process_group("cuda:1"):
        pass


def test_shipped_suites_are_in_range() -> None:
    for name in suites.names():
        assert suites.load(name)
