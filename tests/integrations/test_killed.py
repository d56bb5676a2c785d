"""Two tasks whose process is killed in each: parameters and averages are those of training without interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import waiting
from _pytest.mark import ParameterSet
from integrations.killed import KILLED, KINDS
from integrations.trainers import assert_equal
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with what `killed.py` wrote of a kind of trainer, and what it said."""
    folder = tmp_path_factory.mktemp(request.param)
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed.py")), request.param, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    [(said, _)] = waiting.outputs([child])
    assert child.returncode == 0, said
    return folder, said


def cases() -> list[ParameterSet]:
    """SFTTrainer has the loop of Trainer."""
    slow = {"trainer": (), "sft": pytest.mark.slow, "peft": pytest.mark.slow}
    return [pytest.param(kind, rule, marks=slow[kind]) for kind, rules in KINDS.items() for rule in rules]


@pytest.mark.parametrize(("ended", "rule"), cases(), indirect=["ended"])
def test_killed_and_resumed_is_bitwise_the_same(ended: tuple[Path, str], rule: str) -> None:
    folder, said = ended
    statuses = json.loads((folder / "statuses.json").read_text())
    assert statuses[rule] == [0, *[-signal.SIGKILL] * len(KILLED), 0], said
    assert_equal(*(load_file(folder / rule / f"{name}.safetensors") for name in ("whole", "resumed")))
