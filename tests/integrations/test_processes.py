"""Two processes under DistributedDataParallel: what one process computes, to rounding, and the same bits in both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
import waiting
from integrations.processes import trained
from safetensors.torch import load_file


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["pema", "pema-kron", "pema-step"])
def test_two_processes_are_one(rule: str, tmp_path: Path) -> None:
    """`pema-kron` reads the gradients of branches that DistributedDataParallel does not reduce."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    child = subprocess.Popen(
        [*command, str(Path(__file__).with_name("processes.py")), rule, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=children.environment(OMP_NUM_THREADS="1"),
    )
    [(said, _)] = waiting.outputs([child])
    assert child.returncode == 0, said
    two, one = load_file(tmp_path / "found.safetensors"), trained(rule, tmp_path / "one", accumulation=4)
    assert two.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
