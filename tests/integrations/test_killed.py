"""Two tasks whose process is killed in each: parameters and averages are those of training without interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import children
import pytest
import waiting
from _pytest.mark import ParameterSet
from integrations.killed import KILLED, KINDS
from integrations.trainers import assert_equal
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Runs `killed.py` with a kind of trainer, once: the folder with what it wrote, and what it said."""

    @cache
    def end(kind: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(kind)
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py")), kind, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=children.environment(OMP_NUM_THREADS="1"),
        )
        [(said, _)] = waiting.outputs([child])
        assert child.returncode == 0, said
        return folder, said

    return end


def cases() -> list[ParameterSet]:
    """SFTTrainer has the loop of Trainer."""
    slow = {"trainer": (), "sft": pytest.mark.slow, "peft": pytest.mark.slow}
    return [pytest.param(kind, rule, marks=slow[kind]) for kind, rules in KINDS.items() for rule in rules]


@pytest.mark.parametrize(("kind", "rule"), cases())
def test_killed_and_resumed_is_bitwise_the_same(ended: Callable[[str], tuple[Path, str]], kind: str, rule: str) -> None:
    folder, said = ended(kind)
    statuses = json.loads((folder / "statuses.json").read_text())
    assert statuses[rule] == [0, *[-signal.SIGKILL] * len(KILLED), 0], said
    assert_equal(*(load_file(folder / rule / f"{name}.safetensors") for name in ("whole", "resumed")))
