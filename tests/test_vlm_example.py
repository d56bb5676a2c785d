"""docs/vlm as a user runs it: a model that sees trained on two tasks by SFTTrainer, and loaded without cnext."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from backbones.small_vlms import write_llava
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[1] / "docs" / "vlm"


def run(script: str, *arguments: Path) -> str:
    # The scripts' own warnings are those of other libraries.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=arguments[1].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_is_trained_by_sft_trainer_and_loaded_by_stock_peft(tmp_path: Path) -> None:
    model, folder = write_llava(tmp_path / "llava"), tmp_path / "out"
    run("train.py", model, folder)
    differences = re.findall(r"logits differ by (\S+)", run("load.py", model, folder))
    assert len(differences) == 3
    assert all(float(difference) <= 1e-5 for difference in differences)
    assert any(tensor.any() for name, tensor in load_file(folder / "branches" / "adapter_model.safetensors").items()
               if "lora_B" in name)  # fmt: skip
    assert not any("branches" in name for name in load_file(folder / "merged" / "model.safetensors"))
    assert {path.name for path in (folder / "Counts").glob("checkpoint-*")} == {"checkpoint-4"}
