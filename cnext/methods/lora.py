"""LoRA: one low-rank branch of rank 32, trained on every task in turn (sequential fine-tuning).

Reference: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank


@dataclass
class Lora(LowRank):
    """y = W x + scale B A x."""

    scale: float = 6.0
    lr_factor: float = 0.25

    card = Card("arXiv 2106.09685", grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)})
