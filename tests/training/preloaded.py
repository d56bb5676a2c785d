"""Preloaded by the process from which runs are forked, so that each has the models in memory."""

from __future__ import annotations

import torch
from training import faults

from cnext.scoring.clip import load_clip

torch.set_num_threads(1)
BACKBONE, CLIP = faults.TinyBackbone.load(), load_clip("tiny", "cpu")
