"""Imported once by the process from which runs are forked: what the first run would load is there in all of them."""

from __future__ import annotations

import torch
from training import faults

from cnext.scoring.clip import load_clip

torch.set_num_threads(1)
BACKBONE, CLIP = faults.TinyBackbone.load(), load_clip("tiny", "cpu")
