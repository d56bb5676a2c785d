"""Upper bound: a joint-training reference, LoRA of rank 32 on all tasks' samples shuffled together.

One stage with the budget of all tasks: the sum of their steps, one schedule, every sample equally often. It is not a
continual learner, and not a strict bound either: in the paper it scores lower on three tasks than sequential training
right after each of them, and the paper gives no budget. Only the last row of its score matrix exists, so there is no
forgetting.

Reference: Continual-NExT, arXiv 2602.18055, Table 1 ("Upper-Bound").
"""

from __future__ import annotations

from dataclasses import dataclass

from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank


@dataclass
class UpperBound(LowRank):
    """y = W x + scale B A x, trained on all tasks at once."""

    scale: float = 3.0
    lr_factor: float = 2.0

    joint = True
    card = Card(
        "arXiv 2602.18055, Table 1",
        keeps="every training sample of every task until all are there",
        grid={"scale": (1.0, 3.0, 6.0), "lr_factor": (0.25, 0.5, 1.0, 2.0)},
    )
