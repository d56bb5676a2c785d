"""Loads what train.py saved, without cnext: by PEFT, by transformers' Auto class, and as a plain model.

python load.py MODEL FOLDER
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

name, folder = sys.argv[1], Path(sys.argv[2])
inputs = load_file(folder / "logits.safetensors")
expected = inputs.pop("logits")
loaded = {
    "base and adapter, by PEFT": PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(name), str(folder / "branches")
    ),
    "the adapter's folder, by transformers": AutoModelForImageTextToText.from_pretrained(folder / "branches"),
    "the merged model": AutoModelForImageTextToText.from_pretrained(folder / "merged"),
}
for how, model in loaded.items():
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    difference = (logits - expected).abs().max().item()
    print(f"{how}: logits differ by {difference:.1e}")
    assert difference <= 1e-5, how
assert "cnext" not in sys.modules
