"""docs/own_suite/own_suite.py as a user runs it: Parquet files and a scorer of one's own, two methods compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backbones.small_vlms import write_llava

SCRIPT = Path(__file__).parents[1] / "docs" / "own_suite" / "own_suite.py"


@pytest.mark.parametrize("backbone", ["tiny", "hf"])
def test_two_methods_learn_and_are_compared(backbone: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "own"), "--backbone", backbone, "--preset", "smoke"]
    if backbone == "hf":
        command += ["--weights", str(write_llava(tmp_path / "llava"))]
    environment = os.environ | {"CNEXT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--device", "cpu"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "own" / "runs").rglob("results.json"))
    assert len(runs) == 2
    for file in runs:
        results = json.loads(file.read_text())
        assert results["finished"]
        assert results["samples"] == {"Colors": 16, "Shapes": 16}
        assert json.loads((file.parent / "config.json").read_text())["code"].keys() == {"scoring:near"}
    assert "Avg.ACC" in done.stdout or "avg_acc" in done.stdout, done.stdout
